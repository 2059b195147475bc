"""`enstack fit|validate|test|predict`: LightningCLI around the classifier, its data and the guard.

The order of things: the command line is parsed once to find `--ckpt_path`; that checkpoint is verified; what it was
trained with becomes the defaults, below the config file and the command line; then everything is parsed again.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, get_args

import jsonargparse
import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ModelSummary, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from enstack_lightning.checkpoint import Report
from enstack_lightning.checkpoint.rendering.plain import printable
from enstack_lightning.cli import CHECKPOINT_CALLBACKS
from enstack_lightning.cli.enstack_folder import Converted, convert_to_evaluate, convert_to_resume
from enstack_lightning.cli.output import WrongCallError, refuse_to_replace
from enstack_lightning.cli.predictions import PredictionWriter
from enstack_lightning.cli.rank_zero import forget_what_was_told, told_by_rank_zero
from enstack_lightning.cli.start import newest_in, usable, whats_done
from enstack_lightning.data import VulnerabilityDataModule
from enstack_lightning.data.splits import Split, split_file
from enstack_lightning.errors import CheckpointError, EnStackError
from enstack_lightning.guard import CheckpointGuard, RecoveryCheckpoint
from enstack_lightning.guard.ledger import SampleLedger
from enstack_lightning.model import VulnerabilityClassifier

DEFAULT_SEED = 42
_LINKED = {"model": {"vocab_size"}, "data": {"num_labels"}}
_CKPT_PATH_HELP = (
    "path of the checkpoint, or of an EnStack folder, that {does}; auto: the newest good one of the run's folder{none}"
    "; last, best and hpc are Lightning's"
)


def main(argv: Sequence[str]) -> int:
    """Runs `enstack fit`, `validate`, `test` or `predict`."""
    _silence_what_users_cannot_act_on()
    try:
        EnStackCLI(data_path_spelled_out(argv))
    except _FinishedError as e:
        rank_zero_info(str(e))
    except EnStackError:
        raise
    except SystemExit as e:
        if isinstance(e.__context__, KeyboardInterrupt):  # as Lightning ends after Ctrl-C, with status 1
            raise KeyboardInterrupt from e
        raise
    except OSError as e:
        if not e.strerror or isinstance(e, BrokenPipeError):
            raise
        raise EnStackError(f"{e.filename or 'a file of the run'} cannot be used: {e.strerror}") from e
    except UnicodeDecodeError as e:
        if not _raised_in(e, jsonargparse):
            raise
        raise WrongCallError(f"a --config is no YAML: {e}") from e
    except (MisconfigurationException, ValueError) as e:
        if isinstance(e, ValueError) and not _raised_in(e, lightning):
            raise
        raise EnStackError(" ".join(str(e).split())) from e
    return 0


class _FinishedError(Exception):
    """The run of `--ckpt_path auto` has nothing left to train: no failure, since one command line serves all starts."""


def data_path_spelled_out(argv: Sequence[str]) -> list[str]:
    """`--data PATH` as `--data.path PATH`; a config file for the data module stays what it is.

    Example:
        >>> data_path_spelled_out(["fit", "--data", "some/folder"])
        ['fit', '--data.path', 'some/folder']
    """
    arguments = [part for a in argv for part in (a.split("=", 1) if a.startswith("--data=") else [a])]
    for i, value in enumerate(arguments[1:], start=1):
        if arguments[i - 1] == "--data" and not value.lstrip().startswith("{") and not _is_config(value):
            arguments[i - 1] = "--data.path"
    return arguments


class _Parser(LightningArgumentParser):
    """Says what is wrong with a command line and where its options are listed, instead of listing them all."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        prog = (getattr(ex, "subcommand_parser", None) or self).prog.replace(" [options]", "")
        print("\n".join(map(printable, f"{prog}: {message}".splitlines())), file=sys.stderr)
        self.exit(2, f"{prog} --help lists the options\n")


class _SaveConfigOfTraining(SaveConfigCallback):
    """Leaves what the run was trained with as it is when it is evaluated into the same folder."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class EnStackCLI(LightningCLI):
    """LightningCLI with the classifier, its data module, the guard and three checkpoints.

    Callbacks that are always there, each with options of its own: `checkpoint_guard`, `best_model` (highest `val/f1`),
    `last_checkpoint` (every epoch's end), `recovery_checkpoint` (every N steps, removed when its epoch completes),
    `learning_rate_monitor`, `sample_ledger` (which rows were trained; `enstack ledger` reads it).

    Args:
        args: the command line after `enstack`; None takes that of the process.

    Raises:
        EnStackError: the checkpoint, the data or an option cannot be used; the message says what to do.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        self._called = (sys.argv[1:] if args is None else args)[:1]
        self._saved: Mapping[str, Any] = {}
        self._loaded_instead: str | None = None
        self._converted: Path | None = None
        try:
            super().__init__(
                VulnerabilityClassifier,
                VulnerabilityDataModule,
                args=args,
                seed_everything_default=DEFAULT_SEED,
                save_config_callback=_SaveConfigOfTraining,
                save_config_kwargs={"overwrite": True},
                auto_configure_optimizers=False,
                # Otherwise `hyper_parameters` names a function for load_from_checkpoint to import.
                load_from_checkpoint_support=False,
                parser_class=_Parser,
                parser_kwargs={"prog": "enstack", "description": "Fine-tunes a code encoder, safely."},
            )
        finally:
            forget_what_was_told()
            if self._converted is not None and _is_rank_zero():
                self._converted.unlink(missing_ok=True)

    # Parsing

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the one that is called, where one is: the options of each take every start a tenth of a second."""
        known = LightningCLI.subcommands()
        return {name: skip for name, skip in known.items() if name in self._called} or known

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(CheckpointGuard, "checkpoint_guard")
        parser.add_lightning_class_args(ModelCheckpoint, "best_model")
        parser.add_lightning_class_args(ModelCheckpoint, "last_checkpoint")
        parser.add_lightning_class_args(RecoveryCheckpoint, "recovery_checkpoint")
        parser.add_lightning_class_args(LearningRateMonitor, "learning_rate_monitor")
        parser.add_lightning_class_args(SampleLedger, "sample_ledger")
        parser.set_defaults(
            {
                "best_model.filename": "best_model",
                "best_model.monitor": "val/f1",
                "best_model.mode": "max",
                "best_model.save_on_train_epoch_end": True,
                "last_checkpoint.filename": "last_checkpoint",
                "last_checkpoint.save_on_train_epoch_end": True,
                "sample_ledger.rows": "row",
            }
        )
        parser.link_arguments("model.num_labels", "data.num_labels")
        parser.link_arguments("data.vocab_size", "model.vocab_size")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        checkpoint = next(action for action in parser._actions if action.dest == "ckpt_path")
        does, none = (
            ("training goes on from", ", or a fresh start where there is none")
            if subcommand == "fit"
            else (f"{subcommand} takes the weights from", "")
        )
        checkpoint.help = _CKPT_PATH_HELP.format(does=does, none=none)
        if subcommand == "predict":
            parser.add_argument("--output", default="predictions.jsonl", help="JSON Lines file for the predictions")
            parser.set_defaults({"return_predictions": False})
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        subcommand = self.config.subcommand
        if subcommand == "predict":
            refuse_to_replace(self.config.predict.output, _files_read(self.config.predict))
        path = self.config[subcommand].get("ckpt_path")
        if path == "":
            raise CheckpointError("--ckpt_path names no checkpoint; is a variable of the script unset?")
        if path == "auto":
            errors = (CheckpointError, _FinishedError)
            path = told_by_rank_zero(lambda: self._newest_checkpoint(subcommand), errors)
            self._loaded_instead = path
        if not path or path in ("last", "best", "hpc") or "://" in path:
            return  # the Trainer finds out which file that is, and the guard verifies it then
        report = usable(path, subcommand, self.config[subcommand].checkpoint_guard)
        file, tokenizer = report.path, None
        if Path(file).is_dir():
            converted = self._convert(report, subcommand)
            self._loaded_instead, tokenizer = str(self._converted), converted.tokenizer
            # The file itself may not be written yet, where this is not rank 0.
            self._saved = {k: v for k, v in converted.checkpoint.items() if k not in ("state_dict", "optimizer_states")}
        else:
            self._saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        saved = _saved_options(self._saved) | ({"data.tokenizer": tokenizer} if tokenizer else {})
        self._subcommand_parsers[subcommand].set_defaults(saved)
        self.config = parser.parse_args(args)
        if self._converted is not None and not tokenizer and not _has_tokenizer(self._saved, self.config[subcommand]):
            raise CheckpointError(
                f"checkpoint {path} names no tokenizer: give the one it was trained with, --data.tokenizer"
            )

    def _convert(self, report: Report, subcommand: str) -> Converted:
        """Writes a folder as the `.ckpt` that this run loads; it is hidden in the run's folder, and goes with the run.

        Raises:
            CheckpointError: the folder cannot be used, or its copy not be written.
        """
        config, folder = self.config[subcommand], Path(report.path)
        if subcommand == "fit":
            options = {**config.best_model.as_dict(), "dirpath": config.best_model.dirpath or _folder_of_run(config)}
            converted = convert_to_resume(
                folder, report, config.trainer.accumulate_grad_batches or 1, ModelCheckpoint(**options)
            )
        else:
            converted = convert_to_evaluate(folder, report)
        self._converted = Path(config.trainer.default_root_dir or ".") / f".{folder.resolve().name}.folder.ckpt"
        if _is_rank_zero():  # the others wait for it before they load
            try:
                self._converted.parent.mkdir(parents=True, exist_ok=True)
                torch.save(converted.checkpoint, self._converted)
            except (OSError, RuntimeError) as e:  # torch says the latter where a disk is full
                raise CheckpointError(f"{self._converted}, the copy of {folder} to load, cannot be written: {e}") from e
        if converted.said:
            rank_zero_info(f"resume from folder   {folder}: {'; '.join(converted.said)}")
        return converted

    def _newest_checkpoint(self, subcommand: str) -> str | None:
        """The newest good checkpoint of the run's folders; None for a fresh start.

        Raises:
            CheckpointError: there are checkpoints and none is good, or there is nothing to evaluate.
            _FinishedError: the run has ended.
        """
        config = self.config[subcommand]
        folders = [config[name].dirpath or _folder_of_run(config) for name in CHECKPOINT_CALLBACKS]
        newest = newest_in(folders, subcommand, config.checkpoint_guard)
        if newest is not None:
            if subcommand == "fit" and (done := whats_done(newest, config.trainer)):
                raise _FinishedError(f"ckpt_path auto   {newest.path}: nothing left to train, {done}")
            plan = f": {newest.resume.sentence}" if newest.resume is not None else ""
            rank_zero_info(f"ckpt_path auto   {newest.path}{plan}")
            return newest.path
        where = ", ".join(dict.fromkeys(folders))
        if subcommand != "fit":
            raise CheckpointError(f"--ckpt_path auto found no checkpoint in {where}: name one")
        rank_zero_info(f"ckpt_path auto   none in {where}: a fresh start")
        return None

    def _parse_ckpt_path(self) -> None:
        """Nothing: LightningCLI would load the whole checkpoint here, and let it override the command line."""

    # Instantiation

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if self.subcommand != "fit" and config.ckpt_path is None and not config.model.pretrained:
            raise CheckpointError("no --ckpt_path is given, and with pretrained: false the weights would be random")
        if config.data.tokenizer is None and config.model.pretrained:
            config.data.tokenizer = config.model.model_name_or_path
        for name in CHECKPOINT_CALLBACKS:
            if config[name].dirpath is None:
                config[name].dirpath = _folder_of_run(config)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        on_terminal = sys.stdout.isatty()
        trainer = self.config_init[self.subcommand].trainer
        callbacks = [*(trainer.callbacks or []), EpochLines()]
        if self.subcommand == "predict":
            callbacks.append(PredictionWriter(self.config_init.predict.output, self.model.label_names))
        if trainer.enable_progress_bar is None:
            kwargs["enable_progress_bar"] = on_terminal
        if on_terminal and trainer.enable_progress_bar is not False:
            callbacks.append(RichProgressBar())
        if not on_terminal and trainer.enable_model_summary is not False:
            callbacks.append(ModelSummary())  # in plain text; Lightning's own choice draws boxes into log files
        if trainer.logger is None:
            kwargs["logger"] = TensorBoardLogger(trainer.default_root_dir or ".", name=None, version="logs")
        instance: Trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        return instance

    def after_instantiate_classes(self) -> None:
        self.datamodule.load_state_dict(dict(self._saved.get(VulnerabilityDataModule.__qualname__) or {}))

    # Running

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        if arguments.get("ckpt_path") == "auto" or self._converted is not None:
            arguments["ckpt_path"] = self._loaded_instead  # the saved config keeps what was asked for
        return arguments

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as e:
            if not str(e).startswith("Error(s) in loading state_dict"):
                raise
            raise CheckpointError(_mismatch(str(e), self.trainer.ckpt_path)) from e


class EpochLines(Callback):
    """One line an epoch, which reads well in a log file and above a progress bar."""

    def __init__(self) -> None:
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.perf_counter()  # a resume inside an epoch has no on_train_epoch_start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        shown = ("train/loss", "val/loss", "val/f1", "val/accuracy")
        figures = "  ".join(f"{k} {trainer.callback_metrics[k]:.4f}" for k in shown if k in trainer.callback_metrics)
        of = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        if trainer.is_global_zero:
            trainer.print(
                f"epoch {trainer.current_epoch + 1}{of}  step {trainer.global_step:,}  {figures}  "
                f"{time.perf_counter() - self._began:.1f} s",
                flush=True,
            )


def _is_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _has_tokenizer(entries: Mapping[str, Any], config: Any) -> bool:
    held = entries.get(VulnerabilityDataModule.__qualname__) or {}
    return bool(config.data.tokenizer or held.get("tokenizer_json") or config.model.pretrained)


def _files_read(config: Any) -> list[str | Path]:
    """The files that a prediction reads, and those of the other splits beside them."""
    found: list[str | Path] = [config.ckpt_path] if config.ckpt_path else []
    found += [str(path) for path in config.get("config") or []]
    given: dict[Split, str | None] = {split: config.data[f"{split}_file"] for split in get_args(Split)}
    for split in given:
        with contextlib.suppress(EnStackError):  # it is not there
            found.append(split_file(split, Path(config.data.path) if config.data.path else None, given))
    return found


def _folder_of_run(config: Any) -> str:
    return str(Path(config.trainer.default_root_dir or ".") / "checkpoints")


def _saved_options(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the run that saved, by their names on the command line."""
    groups = {
        "model": (VulnerabilityClassifier, entries.get("hyper_parameters")),
        "data": (VulnerabilityDataModule, entries.get("datamodule_hyper_parameters")),
    }
    return {
        f"{group}.{name}": value
        for group, (kind, options) in groups.items()
        for name, value in (options or {}).items()
        if name in signature(kind).parameters and name not in _LINKED[group]
    }


def _mismatch(message: str, path: object) -> str:
    lines = [line.strip() for line in message.splitlines()[1:] if line.strip()]
    more = f" and {len(lines) - 1:,} more" if len(lines) > 1 else ""
    kind, *names = (lines[0].rstrip(". ") if lines else message).split(", ")
    if len(names) > 2:  # all keys of the model, where the checkpoint is of another
        names[2:] = [f"... ({len(names) + 1:,} in all)"]
    return (
        f"checkpoint {path} does not fit the model: {', '.join((kind, *names))}{more}. "
        "Use the model options of the run that saved it, or leave them out to take them from the checkpoint."
    )


def _raised_in(error: Exception, package: ModuleType) -> bool:
    """Whether a package itself objected to an option, rather than code that it called."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    last = next(file for file in reversed(files) if not file.startswith("<frozen "))
    return Path(last).is_relative_to(Path(package.__file__ or "").parent)


def _silence_what_users_cannot_act_on() -> None:
    """Deprecations inside torchdata and Lightning, Lightning's advertisements and what it did not have to do."""
    warnings.filterwarnings("ignore", ".*set_vital.* is deprecated")
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: (
            not any(words in str(record.msg) for words in ("Tip: For seamless", "Skipping setting a default"))
        )
    )


def _is_config(value: str) -> bool:
    return value.startswith("-") or (value.endswith((".yaml", ".yml", ".json")) and not Path(value).is_dir())
