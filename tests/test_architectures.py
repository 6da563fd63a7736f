"""Every network of the folder, and the published report's own numbers."""

import pickle

import pytest
import torch
import torchvision
from hostile_runs import Payload
from safetensors.torch import save_file
from torch import nn

from architectures._blocks import same_padding
from harness.config import BadInput, Trial, plugins
from harness.training.network import build_network, summarize_network

ALL = plugins.names("architectures")


def build(name: str, num_classes: int = 10, input_size: int = 32, **options) -> nn.Module:
    return build_network(Trial(architecture=name, options=options), num_classes, input_size)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("num_classes", "input_size"), [(10, 32), (7, 48), (3, 33)])
def test_logits_of_any_size(name, num_classes, input_size):
    network = build(name, num_classes, input_size).eval()
    with torch.inference_mode():
        logits = network(torch.randn(2, 3, input_size, input_size))
    assert logits.shape == (2, num_classes)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_same_seed_same_weights(name):
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(torch.cat([p.flatten() for p in build(name).parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("name", ALL)
def test_unknown_option_names_the_known_ones(name):
    with pytest.raises(BadInput, match="no such option; choose from"):
        build(name, colour="blue")


@pytest.mark.parametrize("name", ALL)
def test_layers_add_up(name):
    summary = summarize_network(build(name), 32)
    assert sum(layer.parameters for layer in summary.layers) == summary.parameters
    assert sum(layer.macs for layer in summary.layers) == summary.macs
    assert summary.layers[-1].output_shape == (1, 10)


def test_summary_leaves_the_network_as_it_was():
    network = build("model1")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    summarize_network(network, 32)
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("baseline", 390_410), ("final", 6_382_090), ("model1", 225_482), ("model2", 4_181_002)],
)
def test_parameters(name, parameters):
    # the report's 1g: (5*5*3+1)*32 + (5*5*32+1)*64 + (5*5*64+1)*128 + (2048+1)*64 + (64+1)*10 = 390,410
    assert summarize_network(build(name), 32).parameters == parameters


def test_report_1a_convolution():
    image = torch.tensor([[1, 0, 2, 3, 1], [3, 2, 0, 7, 0], [0, 6, 1, 1, 4]], dtype=torch.float32)
    kernel = torch.tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=torch.float32)
    found = nn.functional.conv2d(image[None, None], kernel[None, None], padding=1)[0, 0]
    # The report prints 0 and -11 at the end of the first row: slips of hand arithmetic.
    assert found.tolist() == [[2, -1, 11, -2, -13], [10, -4, 8, 2, -18], [14, -1, -5, 6, -9]]


def test_report_1d_to_1g_sizes():
    assert same_padding(5) == 2  # 1d

    def side(size: int, layer: nn.Module) -> int:
        return layer(torch.zeros(1, 1, size, size)).shape[-1]

    assert side(512, nn.Conv2d(1, 1, 9)) == 504  # 1e
    assert side(504, nn.MaxPool2d(2, stride=2)) == 252  # 1f
    assert side(252, nn.Conv2d(1, 1, 3)) == 250  # 1g


@pytest.mark.parametrize(
    ("name", "flattened"), [("baseline", 2048), ("model1", 2048), ("model2", 2048), ("final", 4096)]
)
def test_flattened_sizes(name, flattened):
    first = next(m for m in build(name).modules() if isinstance(m, nn.Linear))
    assert first.in_features == flattened


def kinds(network: nn.Module) -> list[str]:
    return [type(m).__name__ for m in network.modules() if not list(m.children())]


def test_order_of_layers():
    assert kinds(build("model1"))[:5] == ["Conv2d", "ReLU", "BatchNorm2d", "MaxPool2d", "Dropout"]
    assert kinds(build("model1", batch_norm="before"))[:3] == ["Conv2d", "BatchNorm2d", "ReLU"]
    assert kinds(build("final"))[:6] == ["Conv2d", "BatchNorm2d", "Mish", "Conv2d", "Mish", "MaxPool2d"]
    assert kinds(build("model2"))[-5:] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert "BatchNorm2d" not in kinds(build("final", batch_norm="none"))
    assert kinds(build("final", batch_norm="all")).count("BatchNorm2d") == 6


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("baseline", "kernel_size", 4),
        ("baseline", "activation", "tanhh"),
        ("baseline", "batch_norm", "sometimes"),
        ("final", "batch_norm", "before"),
        ("transfer", "frozen", ["layer9"]),
        ("transfer", "weights", "/nowhere.safetensors"),
    ],
)
def test_bad_option_is_named(name, option, value):
    with pytest.raises(BadInput, match=option):
        build(name, **{option: value})


def test_too_small_images():
    with pytest.raises(BadInput, match="needs at least 16"):
        build("model2", input_size=8)


def test_transfer_trains_only_what_is_not_frozen():
    torch.manual_seed(0)
    network = build("transfer", resize=0)
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    network(torch.randn(4, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    changed = {name.split(".")[1] for name, t in network.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"layer4", "fc"}  # statistics of frozen batch norm stay too


def test_transfer_enlarges_inside():
    network = build("transfer")
    seen = []
    network.network.conv1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    with torch.inference_mode():
        network.eval()(torch.zeros(1, 3, 32, 32))
    assert seen == [(1, 3, 112, 112)]


def test_transfer_takes_a_state_dict_but_its_head(tmp_path):
    source = build("transfer", num_classes=5)
    state = source.network.state_dict()
    save_file(state, tmp_path / "body.safetensors")
    loaded = build("transfer", num_classes=10, weights=str(tmp_path / "body.safetensors"))
    assert torch.equal(loaded.network.layer1[0].conv1.weight, source.network.layer1[0].conv1.weight)
    assert loaded.network.fc.out_features == 10

    state["layer2.0.conv1.weight"] = torch.zeros(3, 3)
    save_file(state, tmp_path / "wrong.safetensors")
    with pytest.raises(BadInput, match=r"layer2\.0\.conv1\.weight is of shape \(3, 3\), ResNet-18 has \(128, 64"):
        build("transfer", weights=str(tmp_path / "wrong.safetensors"))

    save_file(torchvision.models.resnet34().state_dict(), tmp_path / "deeper.safetensors")
    with pytest.raises(BadInput, match=r"layer1\.2\.\S+ is of shape \S+.*, ResNet-18 has no tensor of that name"):
        build("transfer", weights=str(tmp_path / "deeper.safetensors"))


def test_something_is_left_to_train():
    names = [*dict(build("transfer").network.named_children())]
    with pytest.raises(BadInput, match="nothing is left to train"):
        build("transfer", frozen=names)


@pytest.mark.parametrize("name", ["text.safetensors", "text.pt", "list.pt", "numbers.pt", "object.pt", "pickle.pt"])
def test_weights_that_are_none(tmp_path, name):
    file = tmp_path / name
    file.write_text("no weights at all")
    if name == "list.pt":
        torch.save([torch.zeros(3)], file)
    if name == "numbers.pt":
        torch.save({"conv1.weight": 3}, file)
    if name == "object.pt":
        torch.save({"conv1.weight": Payload(tmp_path / "mark")}, file)
    if name == "pickle.pt":
        file.write_bytes(pickle.dumps(Payload(tmp_path / "mark")))
    with pytest.raises(BadInput, match=rf"weights={file}: cannot be read as a state dict"):
        build("transfer", weights=str(file))
    assert not (tmp_path / "mark").exists()


def test_user_file(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def build(num_classes, width=4):\n"
        "    layers = nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)\n"
        "    return nn.Sequential(*layers)\n"
    )
    network = build(str(tmp_path / "net.py"), width=6)
    assert network[0].out_channels == 6
