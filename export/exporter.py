"""Exports the winner of a run: writes its files and compares their logits with PyTorch's on every test image."""

import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from export import SERVED_BY, Artifact, parity
from export.check import Check
from export.formats import CALIBRATION_IMAGES, FORMATS, Format, NotPossible, Source
from export.process import RuntimeProcess, memory_limit
from export.recorded import check_answers
from export.runtimes import Unavailable
from harness.config import Export
from harness.config.errors import NotYet
from harness.data.batches import Normalizer
from harness.data.dataset import load_dataset
from harness.data.splits import Dataset, Split
from harness.run import storage, system, trust
from harness.run.directory import RunDirectory
from harness.run.manifest import Digest, ExportTiming, FileEntry, FileInput, Manifest, Mistakes
from harness.run.progress import Progress
from harness.run.provenance import network_files
from harness.run.records import WEIGHTS_FILE, TrialRecord
from harness.run.trust import check_network_code
from harness.stats.ranking import rank, winning_trial
from harness.training.answers import differ
from harness.training.network import reference_network, restore_network

ALONE = 8  # test images that are also answered one by one


def export_winner(run: RunDirectory, settings: Export, progress: Progress) -> None:
    """Export the winning configuration's trial with the best validation.

    Raises NotYet where no trial has finished, RuntimeError where a float32 file fails its parity check.
    """
    recorded = run.recorded()
    ranked = rank(run.trials(), recorded.metric)
    if not ranked:
        raise NotYet(f"run={run.path}: no trial has finished; train with harness.tune first")
    record = winning_trial(ranked[0], recorded.metric)
    check_network_code(run, record)
    folder = run.exported_folder(record.id)
    if is_exported(folder, record, settings):
        progress.line(f"export: {folder.name} is already exported")
        return
    exporter = Exporter(run, record, settings, load_dataset(recorded.data_config), progress)
    try:
        exporter.write_reference()
        for kind in settings.formats:
            exporter.write_format(kind)
        exporter.finish()
    finally:
        exporter.close()


class Exporter:
    """One export: `write_reference`, then `write_format` for each format, then `finish`."""

    def __init__(
        self, run: RunDirectory, record: TrialRecord, settings: Export, data: Dataset, progress: Progress
    ) -> None:
        self.settings, self.data, self.progress = settings, data, progress
        self.trial = record.trial
        self.normalize = Normalizer(self.trial.normalization, torch.device("cpu"), "contiguous")
        self.record = record
        self.process: RuntimeProcess | None = None
        self.trained, self.final = run.trial_folder(record.id), run.exported_folder(record.id)
        self.folder = run.path / f".export-{record.id}"  # moved when it is complete
        for left in run.path.glob(".export-*"):  # of commands that were killed
            shutil.rmtree(left, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.scratch = Path(tempfile.mkdtemp())
        self.pixels = data.test.images[data.test.rows]
        self.test, self.labels = self.normalized(data.test), labels_of(data.test)
        self.manifest = Manifest(
            id=record.id,
            config=record.config,
            weights_sha256=record.weights_sha256,
            code=network_files(record.config["architecture"]),
            classes=list(data.classes),
            normalization=self.trial.normalization.model_dump(mode="json"),
            input_size=data.input_size,
            fingerprint=data.fingerprint,
            environment=system.environment().to_json(),
            settings=settings.model_dump(mode="json"),
            files={},
            absent={},
            timing=ExportTiming(export_seconds={}),
        )
        self.source = Source(
            network=self.network(),  # in contiguous memory format
            example=torch.from_numpy(self.test[:2].copy()),
            calibration=self.normalized(data.train, max(1, len(data.train) // CALIBRATION_IMAGES)),
            validation=self.normalized(data.validation),
            labels=labels_of(data.validation),
            normalization=self.trial.normalization,
            settings=settings,
        )

    def network(self) -> torch.nn.Module:
        sha256, classes = self.manifest.weights_sha256, len(self.data.classes)
        return restore_network(self.trained, self.trial, sha256, classes, self.data.input_size)

    def normalized(self, split: Split, every: int = 1) -> npt.NDArray[np.float32]:
        return self.normalize(torch.from_numpy(split.images[split.rows[::every]])).numpy()

    def write_reference(self) -> None:
        """Write PyTorch's float64 logits of the test images, its most confident mistakes, and the weights."""
        # The rounding of float32 would count against the files.
        dtype, exact = torch.float64, reference_network(self.network())
        try:
            with torch.inference_mode():
                exact(torch.from_numpy(self.test[:1]).double())
        except Exception as error:  # a network may be written for one precision
            dtype, exact = torch.float32, self.network()
            self.progress.line(f"export: the reference is in float32, because float64 fails ({type(error).__name__})")

        def answer(batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
            with torch.inference_mode():
                logits: npt.NDArray[np.float64] = exact(torch.from_numpy(batch).to(dtype)).double().numpy()
            return logits

        precision = str(dtype).removeprefix("torch.")
        counter = self.progress.counter(f"exporting: PyTorch's {precision} logits, images")
        self.reference = parity.predict_all(answer, self.test, counter)
        alone = np.concatenate([answer(one[None]) for one in self.test[:ALONE]])
        if differ(torch.from_numpy(alone), torch.from_numpy(self.reference[:ALONE])):
            raise RuntimeError(
                "an image's logits depend on the other images of its batch: single images would be wrong"
            )
        check_answers(
            self.record,
            self.trained,
            self.reference.argmax(1) == self.labels,
            lambda: parity.predict_all(answer, self.source.validation).argmax(1) == self.source.labels,
        )
        storage.write_array(self.folder / "reference.npy", self.reference)
        sha256 = storage.sha256(self.folder / "reference.npy")
        self.manifest.reference = Digest.model_validate({"precision": precision, "sha256": sha256})
        self.manifest.torch_accuracy = float((self.reference.argmax(1) == self.labels).mean())
        self.manifest.confusion = parity.confusion_counts(self.reference, self.labels).tolist()
        mistakes = parity.confident_mistakes(self.reference, self.labels, self.data.classes)
        storage.write_array(self.folder / "mistakes.npy", self.pixels[[one["row"] for one in mistakes]])
        self.manifest.mistakes = Mistakes(sha256=storage.sha256(self.folder / "mistakes.npy"), images=mistakes)
        weights = self.folder / WEIGHTS_FILE
        storage.write_atomically(weights, (self.trained / WEIGHTS_FILE).read_bytes())
        self.manifest.files[weights.name] = self._entry(weights, "torch", "float32")

    def write_format(self, kind: str) -> None:
        """Write and check the files of a format; where the network cannot be exported in it, record why."""
        made = FORMATS[kind]
        self.progress.status(f"exporting {made.file()}")
        started = time.perf_counter()
        try:
            model, extra = made.make(self.source)
        except NotPossible as reason:
            self._leave_out(kind, str(reason))
            return
        for uint8 in [False, True] if self.settings.uint8 else [False]:
            name = made.file(uint8)
            self.progress.status(f"exporting {name}")
            made.save(model, self.folder / name, self.source, uint8)
            self.manifest.timing.export_seconds[name] = round(time.perf_counter() - started, 2)
            entry = self._entry(self.folder / name, made.kind, made.precision, uint8)
            self.manifest.files[name] = FileEntry.model_validate(entry.to_json() | extra)
            if made.kind == "onnx":
                self.manifest.files[name].opset = self.settings.opset
            try:
                self._check(name, made, uint8)
            except (Unavailable, RuntimeError) as reason:
                if kind == "onnx":
                    raise RuntimeError(f"{name} cannot be checked: {reason}") from reason
                self._leave_out(kind, f"its check failed: {reason}")
                return
            started = time.perf_counter()

    def _leave_out(self, kind: str, reason: str) -> None:
        """Record why a format is absent; removes its files."""
        for uint8 in (False, True):
            name = FORMATS[kind].file(uint8)
            self.manifest.files.pop(name, None)
            (self.folder / name).unlink(missing_ok=True)
        self.manifest.absent[kind] = reason
        self.progress.line(f"export: {kind} is absent: {reason}")

    def _check(self, name: str, made: Format, uint8: bool) -> None:
        """Compare the file's logits, in the runtime of its format, with the reference on every test image. The runtime
        is in another process, which may crash.

        Raises Unavailable or RuntimeError where it cannot be compared.
        """
        check = Check(Artifact(self.folder, self.manifest, name), SERVED_BY[made.kind], "cpu")
        self.manifest.write(self.folder / "manifest.json")
        self.progress.status(f"checking {name}, {len(self.labels):,} test images")
        if self.process is None:
            self.process = RuntimeProcess(torch.get_num_threads(), memory_bytes=memory_limit("cpu"))
        answers = self.scratch / "answers.npy"
        try:
            self.process.load(check, self._images(uint8))
            seconds = self.process.ask("answers", to=str(answers), batch_size=parity.BATCH)["seconds"]
        except Unavailable:
            raise
        except RuntimeError:
            self.process.close()
            self.process = None
            raise
        logits = np.load(answers)
        allowed = None if made.exact else self.settings.max_accuracy_drop
        found = parity.compare_logits(logits, self.reference, self.labels, allowed)
        storage.write_array(check.answers, logits)
        check.store(found, seconds)
        self.manifest.files[name].parity = found.record()
        self.progress.line(f"export: {name}, {found}")

    def _images(self, uint8: bool) -> Path:
        """The .npy file of the test images."""
        file = self.scratch / f"images{'_uint8' if uint8 else ''}.npy"
        if not file.exists():
            np.save(file, self.pixels if uint8 else self.test)
        return file

    def finish(self) -> None:
        """Put the files in the place of an earlier export's, the manifest last.

        Raises RuntimeError if a float32 file failed parity; an earlier export then stays.
        """
        wrong = self.manifest.failed_parity()
        self.manifest.write(self.folder / "manifest.json")
        earlier = self.final / "manifest.json"
        where = f"see parity in {earlier}"
        if wrong and earlier.is_file():
            where = "the earlier export stays"
        else:
            self._move()
        if wrong:
            raise RuntimeError(f"{', '.join(wrong)}: logits differ from PyTorch's by more than the tolerance; {where}")

    def _move(self) -> None:
        self.final.mkdir(parents=True, exist_ok=True)
        (self.final / "manifest.json").unlink(missing_ok=True)  # a manifest must describe existing files
        (self.final / "checks").mkdir(exist_ok=True)  # those of other runtimes stay
        for old in (*self.final.glob("model*.onnx"), *self.final.glob("model*.pt2")):
            old.unlink()
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == "manifest.json"):
            os.replace(path, self.final / path.relative_to(self.folder))
        for name in self.manifest.files:
            if name.endswith(".pt2"):
                trust.remember(self.final / name)

    def close(self) -> None:
        """End the process of the checks; remove what is not finished."""
        if self.process is not None:
            self.process.close()
        for folder in (self.folder, self.scratch):
            shutil.rmtree(folder, ignore_errors=True)

    def _entry(self, path: Path, kind: str, precision: str, uint8: bool = False) -> FileEntry:
        side = self.data.input_size
        given = FileInput(name="images", dtype="float32", shape=["batch", 3, side, side], normalized=True)
        if uint8:
            given = FileInput(name="images", dtype="uint8", shape=["batch", side, side, 3], normalized=False)
        sha256, size = storage.sha256(path), path.stat().st_size
        return FileEntry(format=kind, precision=precision, sha256=sha256, bytes=size, input=given)


def labels_of(split: Split) -> npt.NDArray[np.int64]:
    labels: npt.NDArray[np.int64] = split.labels[split.rows]
    return labels


def is_exported(folder: Path, record: TrialRecord, settings: Export) -> bool:
    """Whether the folder holds an intact export of these weights and settings, with parity of its float32 files."""
    try:
        manifest = Manifest.read(folder / "manifest.json")
    except (OSError, ValueError):
        return False
    digests = {name: entry.sha256 for name, entry in manifest.files.items()}
    for name, digest in (("reference.npy", manifest.reference), ("mistakes.npy", manifest.mistakes)):
        digests[name] = digest.sha256 if digest else ""
    return (
        manifest.weights_sha256 == record.weights_sha256
        and manifest.settings == settings.model_dump(mode="json")
        and all(storage.is_intact(folder / name, sha256) for name, sha256 in digests.items())
        and not manifest.failed_parity()
    )
