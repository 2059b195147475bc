"""`enstack fit|validate|test|predict` on real functions: train, be killed, verify, resume, predict; and wrong calls."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from builders import flip_bit, truncate
from killing import interrupted

from enstack_lightning.checkpoint import Verdict, find_last_good, verify_checkpoint
from enstack_lightning.cli.main import main
from enstack_lightning.cli.training import data_path_spelled_out

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {
    "pretrained": "false",
    "hidden_size": "16",
    "num_hidden_layers": "1",
    "num_attention_heads": "2",
    "intermediate_size": "16",
    "max_position_embeddings": "66",
}
STEPS = 24  # of an epoch: 96 functions in batches of 4


@pytest.fixture
def options(data: Path, cache: Path, tmp_path: Path) -> list[str]:
    trainer = {"accelerator": "cpu", "max_epochs": "2", "default_root_dir": str(tmp_path / "run")}
    values = {f"model.{k}": v for k, v in SIZES.items()} | {f"trainer.{k}": v for k, v in trainer.items()}
    values |= {"data.max_length": "64", "data.vocab_size": "300", "data.train_batch_size": "4"}
    values |= {"data.cache_dir": str(cache), "data.length_bucketing": "true", "model.learning_rate": "0.001"}
    values |= {"recovery_checkpoint.every_n_train_steps": "10"}
    return ["--data", str(data), *(f"--{name}={value}" for name, value in values.items())]


def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


# Configs


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_parses(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlay = config.stem in ("ddp", "fsdp")
    configs = [CONFIGS / "demo.yaml", config] if overlay else [config]
    with pytest.raises(SystemExit) as ended:
        main(["fit", *(part for c in configs for part in ("--config", str(c))), "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(config.read_text())
    for group in ("trainer", "model", "data"):
        for name, value in (given.get(group) or {}).items():
            if not isinstance(value, dict):
                assert printed[group][name] == value, (group, name)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["fit", "--data", "some/folder"], ["fit", "--data.path", "some/folder"]),
        (["fit", "--data=some/folder"], ["fit", "--data.path", "some/folder"]),
        (["fit", "--data", "options.yaml"], ["fit", "--data", "options.yaml"]),
        (["fit", "--data", '{"path": "x"}'], ["fit", "--data", '{"path": "x"}']),
        (["fit", "--data.path", "x", "--data.seed=1"], ["fit", "--data.path", "x", "--data.seed=1"]),
    ],
)
def test_data_takes_a_folder(given: list[str], meant: list[str]) -> None:
    assert data_path_spelled_out(given) == meant


# The main job


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def test_train_be_killed_verify_resume_and_end_as_if_nothing_had_happened(options: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "enstack_lightning", "fit", *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    first, recovery = checkpoints(tmp_path) / "last_checkpoint.ckpt", checkpoints(tmp_path) / "recovery_checkpoint.ckpt"
    deadline = time.monotonic() + 120
    while not (first.exists() and recovery.exists()) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()

    best = find_last_good(tmp_path / "run")
    assert best is not None
    assert best.resume is not None
    assert best.resume.global_step is not None
    assert STEPS <= best.resume.global_step < 2 * STEPS

    assert main(["fit", *options, "--ckpt_path", best.path]) == 0
    resumed = weights(first)
    whole = [o.replace(str(tmp_path / "run"), str(tmp_path / "whole")) for o in options]
    assert main(["fit", *whole]) == 0
    never_stopped = weights(tmp_path / "whole" / "checkpoints" / "last_checkpoint.ckpt")
    assert resumed.keys() == never_stopped.keys()
    for name, tensor in never_stopped.items():
        assert torch.equal(resumed[name], tensor), name
    assert not recovery.exists()
    for path in checkpoints(tmp_path).glob("*.ckpt"):
        assert verify_checkpoint(path).verdict is Verdict.PASS


def test_an_interrupt_ends_a_training_with_130(options: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "enstack_lightning", "fit", *options, "--trainer.max_epochs=100000"]
    done = interrupted(command, lambda _: (checkpoints(tmp_path) / "last_checkpoint.ckpt").exists(), timeout=60)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "enstack fit: interrupted")
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def fitted(data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run folder after two epochs, and the options it was trained with."""
    folder = tmp_path_factory.mktemp("fitted")
    arguments = options.__wrapped__(data, cache, folder)
    assert main(["fit", *arguments]) == 0
    return folder / "run", arguments


def test_a_run_leaves_checkpoints_logs_and_its_config(fitted: tuple[Path, list[str]]) -> None:
    run, _ = fitted
    kept = ["best_model.ckpt", "best_model.ckpt.manifest.json", "last_checkpoint.ckpt"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [*kept, "last_checkpoint.ckpt.manifest.json"]
    assert [p.name.split(".")[0] for p in (run / "logs").glob("events*")] == ["events"]
    saved = yaml.safe_load(next(run.rglob("config.yaml")).read_text())
    assert saved["model"]["hidden_size"] == 16


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_prints_the_metrics_and_the_confusion_matrix(
    command: str, fitted: tuple[Path, list[str]], data: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = fitted
    stage = "val" if command == "validate" else "test"
    path = run / "checkpoints" / "best_model.ckpt"
    # The model's sizes and the data's options come from the checkpoint.
    config = (run / "logs" / "config.yaml").read_bytes()
    call = [command, "--data", str(data), "--data.cache_dir", str(cache), "--trainer.default_root_dir", str(run)]
    assert main([*call, "--trainer.accelerator", "cpu", "--ckpt_path", str(path)]) == 0
    printed = capsys.readouterr().out
    assert (run / "logs" / "config.yaml").read_bytes() == config, "it is what resume-check starts the run with"
    for metric in ("accuracy", "f1", "precision", "recall", "macro_f1", "auroc"):
        assert f"{stage}/{metric}" in printed
    assert "true \\ predicted  CWE-119" in printed


def test_predict_classifies_other_functions_with_the_checkpoints_own_tokenizer(
    fitted: tuple[Path, list[str]], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = fitted
    monkeypatch.chdir(tmp_path)
    rows = [{"func": f"int f{n}(void) {{ return {n}; }}", "idx": 100 + n} for n in range(5)]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "out" / "predictions.jsonl"
    call = ["predict", "--data.predict_file", "new.jsonl", "--output", str(output)]
    call += ["--ckpt_path", str(run / "checkpoints" / "best_model.ckpt"), "--data.cache_dir", str(cache)]
    assert main([*call, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)]) == 0
    predictions = [json.loads(line) for line in output.read_text().splitlines()]
    assert [p["idx"] for p in predictions] == [100, 101, 102, 103, 104]
    for p in predictions:
        assert sum(p["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert p["predicted"] == max(range(5), key=p["probabilities"].__getitem__)
        assert p["label"] == ("CWE-119", "CWE-120", "CWE-469", "CWE-476", "other")[p["predicted"]]
    assert [p.name for p in output.parent.iterdir()] == ["predictions.jsonl"]


def test_a_finished_run_says_that_resuming_would_train_nothing(
    fitted: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, arguments = fitted
    assert main(["fit", *arguments, "--ckpt_path", str(run / "checkpoints" / "last_checkpoint.ckpt")]) == 1
    assert "CK906 max_epochs is 2, and 2 epochs are done: the run would train nothing" in capsys.readouterr().err


def test_the_command_line_wins_over_the_checkpoint(fitted: tuple[Path, list[str]], tmp_path: Path) -> None:
    """LightningCLI lets the checkpoint's hyper-parameters win: Lightning-AI/pytorch-lightning issue 20801."""
    run, arguments = fitted
    given = [*arguments, "--trainer.default_root_dir", str(tmp_path / "longer"), "--trainer.max_epochs", "3"]
    given += ["--model.learning_rate", "0.003", "--ckpt_path", str(run / "checkpoints" / "last_checkpoint.ckpt")]
    with pytest.warns(UserWarning, match="CK907"):  # and the restored schedule wins over both, which is said
        assert main(["fit", *given]) == 0
    saved = yaml.safe_load(next((tmp_path / "longer").rglob("config.yaml")).read_text())
    assert saved["model"]["learning_rate"] == 0.003


# Wrong calls: one sentence, the right status


def one_sentence(printed: str) -> str:
    lines = [line for line in printed.splitlines() if line.startswith("enstack ")]
    assert len(lines) == 1, printed
    assert "Traceback" not in printed
    return lines[0]


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_corrupt_checkpoint_ends_with_1_before_anything_is_built(
    command: str, fitted: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, arguments = fitted
    path = tmp_path / "c.ckpt"
    path.write_bytes((run / "checkpoints" / "best_model.ckpt").read_bytes())
    flip_bit(path, 3_000) if command == "fit" else truncate(path, 3_000)
    capsys.readouterr()
    assert main([command, *arguments, "--ckpt_path", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    said = one_sentence(captured.err)
    assert said.startswith(
        f"enstack {command}: checkpoint {path} must not be used: CK10{5 if command == 'fit' else 4} "
    )


def test_wrong_calls_end_with_a_sentence(
    fitted: tuple[Path, list[str]], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, arguments = fitted
    best = str(run / "checkpoints" / "best_model.ckpt")
    for extra, words in {
        ("--ckpt_path", str(tmp_path / "nowhere.ckpt")): "it is missing",
        ("--ckpt_path", best, "--model.hidden_size", "32"): "does not fit the model",
        ("--ckpt_path", str(trained / "step=7.ckpt")): '.token_type_embeddings.weight", ... (',
        ("--ckpt_path", ""): "--ckpt_path names no checkpoint; is a variable of the script unset?",
        ("--config", best): "a --config is no YAML",
        ("--trainer.default_root_dir", best): f"{best} cannot be used: File exists",
        ("--data", str(tmp_path / "no_data")): "does not exist or is not a folder",
        ("--data.max_length", "1"): "max_length=1 is too small",
        ("--trainer.max_epochs", "3", "--trainer.val_check_interval", "99"): "must be less than or equal",
    }.items():
        capsys.readouterr()
        assert main(["fit", *arguments, *extra]) == (2 if "--config" in extra else 1), extra
        said = one_sentence(capsys.readouterr().err)
        assert words in said
        assert len(said) < 700


def test_predictions_took_the_place_of_a_folder_or_a_device(
    fitted: tuple[Path, list[str]], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.jsonl").write_text('{"func": "int f(void) { return 1; }", "idx": 1}\n')
    call = ["predict", "--data.predict_file", str(tmp_path / "new.jsonl"), "--data.cache_dir", str(cache)]
    call += ["--ckpt_path", str(fitted[0] / "checkpoints" / "best_model.ckpt"), "--trainer.accelerator", "cpu"]
    call += ["--trainer.default_root_dir", str(tmp_path / "run")]
    folder, link, pipe = tmp_path / "folder", tmp_path / "link", tmp_path / "pipe"
    folder.mkdir()
    link.symlink_to("/dev/full")
    os.mkfifo(pipe)
    for output, words in ((folder, "it is a folder"), (link, "No space left on device")):
        capsys.readouterr()
        assert main([*call, "--output", str(output)]) == 1
        assert f"{output} cannot be written: {words}" in one_sentence(capsys.readouterr().err)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert main([*call, "--output", str(pipe)]) == 0
    assert json.loads(os.read(reader, 10_000))["idx"] == 1
    os.close(reader)
    assert pipe.is_fifo()
    assert link.is_char_device()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "link", "new.jsonl", "pipe", "run"]


def test_predictions_replace_neither_their_input_nor_a_checkpoint(
    fitted: tuple[Path, list[str]], cache: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new.jsonl"
    new.write_text('{"func": "int f(void) { return 1; }", "idx": 1}\n')
    best = Path(shutil.copy(fitted[0] / "checkpoints" / "best_model.ckpt", tmp_path))
    other = Path(shutil.copy(best, tmp_path / "other.ckpt"))
    splits = Path(shutil.copytree(data, tmp_path / "data"))
    config = tmp_path / "predict.yaml"
    config.write_text(f"data:\n  predict_file: {new}\n")
    call = ["predict", "--ckpt_path", str(best), "--data.cache_dir", str(cache), "--trainer.accelerator", "cpu"]
    call += ["--trainer.default_root_dir", str(tmp_path / "run"), "--config", str(config)]
    call += ["--data", str(splits)]
    train = next(splits.glob("train.*"))
    for output in (new, best, other, config, train):
        before = output.read_bytes()
        assert main([*call, "--output", str(output)]) == 2
        assert f"--output {output} would replace" in one_sentence(capsys.readouterr().err)
        assert output.read_bytes() == before
    assert not (tmp_path / "run").exists()
    assert main([*call, "--output", str(tmp_path / "out.jsonl")]) == 0
    assert main([*call, "--output", str(tmp_path / "out.jsonl")]) == 0


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_random_weights_are_not_evaluated(command: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, *options]) == 1
    assert "no --ckpt_path is given" in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--model.hidden_size", "many"], "hidden_size"),
        (["--nope"], "unrecognized arguments: --nope"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_an_option_that_cannot_be_parsed_ends_with_2(
    extra: list[str], says: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", *options, *extra])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("enstack fit: ")
    assert said.endswith("\nenstack fit --help lists the options\n")
    assert says in said
    assert len(said.splitlines()) < 10


def test_the_help_says_what_auto_is(capsys: pytest.CaptureFixture[str]) -> None:
    for command, says in (
        ("fit", "or a fresh start where there is none"),
        ("predict", "takes the weights from; auto:"),
    ):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert says in " ".join(capsys.readouterr().out.split())


# Pretrained encoders


def tiny_codebert(folder: Path, data: Path) -> Path:
    """A RoBERTa in the layout of `microsoft/codebert-base`, small and with random weights."""
    from transformers import RobertaConfig, RobertaModel

    from enstack_lightning import VulnerabilityDataModule

    module = VulnerabilityDataModule(str(data), vocab_size=300, max_length=64, cache_dir=str(folder / "cache"))
    module.prepare_data()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(vocab_size=len(module.tokenizer), max_position_embeddings=66, **sizes)
    RobertaModel(config).save_pretrained(folder / "codebert")
    module.tokenizer.save_pretrained(folder / "codebert")
    return folder / "codebert"


@pytest.mark.parametrize("name", ["codebert", "graphcodebert", "unixcoder"])
def test_an_encoder_in_a_local_folder_is_fine_tuned_offline(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    encoder = tiny_codebert(tmp_path, data)
    run = tmp_path / "run"
    call = ["fit", "--config", str(CONFIGS / f"{name}.yaml"), "--model.model_name_or_path", str(encoder)]
    call += ["--data", str(data), "--data.max_length", "64", "--data.cache_dir", str(tmp_path / "cache")]
    call += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.max_epochs", "1"]
    call += ["--trainer.default_root_dir", str(run)]
    assert main(call) == 0
    last = run / "checkpoints" / "last_checkpoint.ckpt"
    assert verify_checkpoint(last).verdict is Verdict.PASS
    assert main([*call, "--trainer.max_epochs", "2", "--ckpt_path", str(last)]) == 0
    assert torch.load(last, weights_only=True)["global_step"] == 12


def test_a_hub_that_cannot_be_reached_gives_one_sentence(data: Path, cache: Path, tmp_path: Path) -> None:
    call = ["fit", "--model.model_name_or_path", "enstack-lightning/is-not-there", "--data", str(data)]
    call += [
        "--data.cache_dir",
        str(cache),
        "--trainer.default_root_dir",
        str(tmp_path),
        "--trainer.accelerator",
        "cpu",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "enstack_lightning", *call],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
    )
    assert done.returncode == 1, done.stderr
    said = one_sentence(done.stderr)
    assert "enstack-lightning/is-not-there" in said
    assert "local folder" in said
