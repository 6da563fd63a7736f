"""`train` for notebooks and scripts: one trial in this process, without Ray."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from harness.config import BadInput, Data, Trial
from harness.data.dataset import Decoded, dataset_of, load_dataset
from harness.run.records import (
    CORRECT_FILE,
    ERROR_FILE,
    HISTORY_FILE,
    TRIAL_FILE,
    WEIGHTS_FILE,
    HistoryRow,
    TrialRecord,
)
from harness.run.storage import check_writable
from harness.training.job import TrainingJob
from harness.training.loop import train_job
from harness.training.network_check import check_network

Arrays = tuple[npt.ArrayLike, npt.ArrayLike]


def train(
    trial: Trial,
    data: Data | Decoded | Arrays,
    *,
    model: nn.Module | None = None,
    seed: int = 0,
    folder: Path | str | None = None,
    read_test: bool = False,
    device: str = "auto",
    callbacks: Sequence[Callable[[HistoryRow], object]] = (),
) -> TrialRecord:
    """Train one trial to the end; every callback is called with each history row, right after its validation.

    `data`: a Data, or images uint8 [N, H, W, 3] with labels [N] as a pair of arrays, or a Decoded with classes and a
    test split. The validation split is drawn from the training images. `model`: a network [N, 3, H, W] -> logits
    [N, classes] to train, from its weights, instead of `trial.architecture`; at the end it holds the kept weights, in
    eval mode on its original device. `folder`: where trial.json, history.csv, model.safetensors and the checkpoints
    for resuming an interrupted training are written; None writes nothing. A `model` resumes only where it has the same
    layers and starts from the same weights as before. What the check of the network finds is a warning. Raises BadInput
    for data or a network that cannot be trained; a failed trial returns a record with `status` and `error`.
    """
    dataset = None
    if not isinstance(data, Data):
        dataset, data = dataset_of(_decoded(data), Data(name="digits")), Data(name="digits")
    if model is not None:
        if not isinstance(model, nn.Module):
            raise BadInput(f"model: a {type(model).__name__}: give a torch.nn.Module")
        trial = trial.model_copy(update={"architecture": f"model:{type(model).__name__}", "options": {}})
    for note in check_network(trial, dataset or load_dataset(data), model):
        warnings.warn(f"{trial.architecture} {note}", stacklevel=2)
    where = None if folder is None else Path(folder).expanduser().absolute()
    if where is not None:
        _check_folder(where)
    digest = hashlib.sha256(f"{trial.model_dump_json()} {seed}".encode()).hexdigest()[:12]
    job = TrainingJob(
        config=trial,
        data=data,
        seed=seed,
        folder=where,
        read_test=read_test,
        device=device,
        labels={"id": where.name if where else digest},
        network=model,
        dataset=dataset,
        callbacks=callbacks,
    )
    return train_job(job)


def _check_folder(folder: Path) -> None:
    """Raises BadInput where the folder holds something else than a trial, or cannot be written to."""
    check_writable(folder, "folder")
    ours = (TRIAL_FILE, ERROR_FILE, HISTORY_FILE, WEIGHTS_FILE, CORRECT_FILE, "checkpoint-", ".")
    if folder.is_dir() and any(not path.name.startswith(ours) for path in folder.iterdir()):
        raise BadInput(f"folder={folder}: holds something else than a trial; give a new folder")


def _decoded(data: Decoded | Arrays) -> Decoded:
    """The data as a Decoded. Raises BadInput where labels are no classes; `dataset_of` checks the rest."""
    if not isinstance(data, Decoded):
        if not isinstance(data, tuple | list) or len(data) != 2:
            kind = f"{len(data)} arrays" if isinstance(data, tuple | list) else f"a {type(data).__name__}"
            raise BadInput(
                f"data: {kind}: give a pair (images, labels); a Decoded for a test split too; or "
                "Data(name='images', root=DIR) for a folder"
            )
        images, labels = np.asarray(data[0]), np.asarray(data[1])
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
            raise BadInput(f"data: labels {labels.dtype} {labels.shape}: give integers from 0 on, one per image")
        classes = tuple(str(i) for i in range(int(labels.max(initial=0)) + 1))
        if absent := sorted({*range(len(classes))} - {*labels.tolist()}) if len(labels) else []:
            raise BadInput(f"data: no image has the label {absent[0]}: labels are the numbers from 0 on, without gaps")
        data = Decoded(classes, (images, labels.astype(np.int64)), None)
    return data
