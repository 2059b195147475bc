"""The figures against scikit-learn's on random data, also where a class has no rows."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn import metrics as sk
from tiny_classifier import TokenRows, built_classifier, loader, short_trainer, tiny_classifier
from torch import Tensor

from enstack_lightning.model.metrics import PresentClassAUROC, confusion_table, evaluation_metrics, training_metrics


def random_predictions(rows: int, present: list[int], num_labels: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(rows, num_labels, generator=draw).softmax(dim=1)
    labels = torch.tensor(present)[torch.randint(len(present), (rows,), generator=draw)]
    return probabilities, labels


def expected_figures(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    truth, predicted = labels.numpy(), probabilities.argmax(dim=1).numpy()
    present = [label for label in range(probabilities.shape[1]) if 0 < (truth == label).sum() < len(truth)]
    areas = [sk.roc_auc_score(truth == label, probabilities[:, label].numpy()) for label in present]
    return {
        "accuracy": sk.accuracy_score(truth, predicted),
        "f1": sk.f1_score(truth, predicted, average="weighted", zero_division=0),
        "precision": sk.precision_score(truth, predicted, average="weighted", zero_division=0),
        "recall": sk.recall_score(truth, predicted, average="weighted", zero_division=0),
        "macro_f1": sk.f1_score(truth, predicted, average="macro", zero_division=0),
        "auroc": sum(areas) / len(areas),
    }


@pytest.mark.parametrize("present", [[0, 1, 2, 3, 4], [0, 1, 3], [2, 4]])
def test_figures_equal_scikit_learn_over_batches(present: list[int]) -> None:
    probabilities, labels = random_predictions(403, present)
    figures = evaluation_metrics(5, "val")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for start in range(0, 403, 32):
            figures.update(probabilities[start : start + 32], labels[start : start + 32])
        computed = {name.removeprefix("val/"): float(value) for name, value in figures.compute().items()}
    assert computed == pytest.approx(expected_figures(probabilities, labels), abs=1e-6)


def test_a_reset_forgets_the_epoch_before() -> None:
    figures = evaluation_metrics(5, "val")
    figures.update(*random_predictions(50, [0, 1], seed=1))
    figures.compute()
    figures.reset()
    probabilities, labels = random_predictions(60, [0, 1, 2, 3, 4], seed=2)
    figures.update(probabilities, labels)
    computed = {name.removeprefix("val/"): float(value) for name, value in figures.compute().items()}
    assert computed == pytest.approx(expected_figures(probabilities, labels), abs=1e-6)


def test_training_figures_equal_scikit_learn() -> None:
    probabilities, labels = random_predictions(200, [0, 1, 2, 3])
    predicted = probabilities.argmax(dim=1)
    figures = training_metrics(5)
    for start in range(0, 200, 16):
        figures.update(predicted[start : start + 16], labels[start : start + 16])
    computed = figures.compute()
    assert float(computed["train/accuracy"]) == pytest.approx(sk.accuracy_score(labels, predicted))
    assert float(computed["train/f1"]) == pytest.approx(sk.f1_score(labels, predicted, average="weighted"))


def test_auroc_of_a_single_class_is_nan_without_a_warning() -> None:
    auroc = PresentClassAUROC(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auroc.update(*random_predictions(8, [3]))
        assert auroc.compute().isnan()


def test_auroc_equals_macro_one_versus_rest() -> None:
    probabilities, labels = random_predictions(300, [0, 1, 2, 3, 4])
    auroc = PresentClassAUROC(5)
    auroc.update(probabilities, labels)
    expected = sk.roc_auc_score(labels.numpy(), probabilities.double().numpy(), multi_class="ovr", average="macro")
    assert float(auroc.compute()) == pytest.approx(expected, abs=1e-6)


def test_validate_logs_the_figures_of_the_whole_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = TokenRows(30, num_labels=4)
    classifier = built_classifier()
    trainer = short_trainer(tmp_path)
    logged = trainer.validate(classifier, loader(rows), verbose=False)[0]
    with torch.no_grad():
        logits = classifier.eval()(rows.input_ids, rows.attention_mask)
    expected = expected_figures(logits.softmax(dim=1), rows.labels)
    expected["loss"] = sk.log_loss(rows.labels, logits.double().softmax(dim=1), labels=range(5))
    assert {name.removeprefix("val/"): value for name, value in logged.items()} == pytest.approx(expected, abs=1e-6)
    matrix = sk.confusion_matrix(rows.labels, logits.argmax(dim=1), labels=range(5))
    assert classifier.confusion_matrix is not None
    assert classifier.confusion_matrix.tolist() == matrix.tolist()
    assert confusion_table(torch.tensor(matrix), classifier.label_names) in capsys.readouterr().out


def test_test_run_logs_its_own_names(tmp_path: Path) -> None:
    logged = short_trainer(tmp_path).test(built_classifier(), loader(TokenRows(12)), verbose=False)[0]
    names = ("loss", "accuracy", "f1", "precision", "recall", "macro_f1", "auroc")
    assert set(logged) == {f"test/{name}" for name in names}


def test_fit_logs_training_and_validation_but_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifier = tiny_classifier()
    trainer = short_trainer(tmp_path, max_epochs=1)
    trainer.fit(classifier, loader(TokenRows(12)), loader(TokenRows(12, seed=1)))
    wanted = {"train/loss", "train/accuracy", "train/f1", "val/loss", "val/f1", "val/auroc"}
    assert wanted <= set(trainer.callback_metrics)
    assert classifier.confusion_matrix is not None
    assert int(classifier.confusion_matrix.sum()) == 12
    assert "Confusion matrix" not in capsys.readouterr().out


def test_confusion_table_is_aligned() -> None:
    table = confusion_table(torch.tensor([[12345, 0], [7, 1]]), ["CWE-119", "a much longer name"])
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["CWE-119", "12,345", "0"]


def test_confusion_matrix_reaches_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="runs")
    short_trainer(tmp_path, logger=logger).test(built_classifier(), loader(TokenRows(8)), verbose=False)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    (event,) = events.Tensors("test/confusion_matrix/text_summary")
    assert b"CWE-476" in event.tensor_proto.string_val[0]
