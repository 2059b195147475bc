"""The restart of the training loops at the very moment that a checkpoint was saved at.

Lightning 2.6 starts again at the next batch. What should have followed the save is left out: the validation that was
due, the end of the epoch with its metrics and schedulers (#20495), the rest of an accumulation window (#19987); at the
last batch of an epoch a stateful loader costs the whole next epoch, and so does a save in `on_train_epoch_start`; with
`max_steps` an epoch's end is counted once more and trains a batch too many (#19403, #19617); a progress bar shows no
total (#20603); SWA has no scheduler for the rest of its epoch. `ExactRestart` does the rest of the step or of the epoch
first, with everything as it stood then.

What cannot be had back: what other callbacks and the module do in the very hook that the checkpoint was saved in,
after the callback that saved it, or after an exception in it; and which ModelCheckpoint saved last, so that one may
save a step again. A step that an exception ended is taken anew, with the random state that it had come to and without
the gradients of its accumulation window.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset

from enstack_lightning.errors import CheckpointGuardError, EnStackError
from enstack_lightning.guard.flavor import rank_zero_info, rank_zero_warn
from enstack_lightning.guard.parts import Parts
from enstack_lightning.guard.restart.epoch_state import restore_epoch_state
from enstack_lightning.guard.restart.fetched_ahead import give_first, in_pieces
from enstack_lightning.guard.restart.layer_options import restore_options
from enstack_lightning.guard.restart.loader_position import as_if_in, begin_epoch_anew, restore_generators
from enstack_lightning.guard.restart.module_state import restore_modes, skip_sanity_check
from enstack_lightning.guard.restart.part_gradients import BATCH_DONE, restore_gradients
from enstack_lightning.guard.restart.plain_order import restore_order
from enstack_lightning.guard.restart.resume_state import STATE_VERSION, running_statistics
from enstack_lightning.guard.restart.rng import restore_random_state
from enstack_lightning.guard.restart.rows import OwnPositions, has_state, loaders_of, rows_given
from enstack_lightning.guard.restart.stock_callbacks import begin_epoch_in_callbacks, restore_frozen, skip_searches

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_IN_EPOCH = ("in_step", *BATCH_DONE)
_EPOCH_DONE = ("epoch_end", "between_epochs", "epoch_start")


def exact_restart(trainer: Trainer, checkpoint: dict[str, Any], key: str) -> ExactRestart | None:
    """Prepares the loops for the moment that a checkpoint was saved at.

    Args:
        trainer: a Trainer that has loaded the checkpoint, and whose loops are not restored yet.
        checkpoint: the loaded dict; the loaders' positions in it become those of this process.
        key: the guard's key among the checkpoint's callbacks.

    Returns:
        What stands in the loops' way until they have started; None where this Lightning's loops are not known.
    """
    if not hasattr(trainer.fit_loop, "update_restart_stage"):
        return None
    with _explained(trainer):
        restart = ExactRestart(trainer, (checkpoint.get("callbacks") or {}).get(key) or {})
    loops = (checkpoint.get("loops") or {}).get("fit_loop", {})
    _begin_epoch_that_was_prepared(loops)
    if restart.loader_states and "state_dict" in loops:
        loops["state_dict"]["combined_loader"] = restart.loader_states
    restart.install()
    return restart


class ExactRestart:
    """Takes the place of a few methods of a Trainer's loops, each until it has been called once.

    Args:
        trainer: a Trainer that is about to restore its loops.
        state: the guard's state in the checkpoint.
    """

    def __init__(self, trainer: Trainer, state: dict[str, Any]) -> None:
        self.trainer: Any = trainer
        self.is_of_another_version = bool(state) and state.get("version") != STATE_VERSION
        if self.is_of_another_version:
            rank_zero_warn(
                f"CheckpointGuard: its state in the checkpoint has version {state.get('version')!r} and this guard "
                f"reads {STATE_VERSION}. The run goes on as Lightning resumes it, with other random numbers; the guard "
                "that saved it would go on exactly"
            )
            state = {}
        self.resume: dict[str, Any] = {**(state.get("resume") or {})}
        ranks = self.resume.pop("ranks", None) or [{"random_state": state.get("random_state")}]
        self.point = self.resume.get("point", "elsewhere")
        self.batch_size = (state.get("run") or {}).get("batch_size")
        self.options: dict[str, Any] = state.get("options") or {}
        self._give_searches_back: Callable[[], None] = lambda: None
        self._give_sanity_check_back: Callable[[], None] = lambda: None
        self.when_restored: Callable[[], None] | None = None
        """Called once, when everything is as it was at the save."""
        self._load_states: Callable[[], None] | None = None
        self.has_order = any(rank.get("order") for rank in ranks)
        """Whether the checkpoint holds the order of a plain loader."""
        self.order_kept: bool | None = None
        """Whether that loader goes on in the epoch's order; None until it is made."""
        alike = len(ranks) == trainer.world_size
        self.mine: dict[str, Any] = ranks[trainer.global_rank] if alike else _of_others(ranks[0])
        if not alike:
            rank_zero_warn(
                f"CheckpointGuard: the checkpoint holds the random state of {len(ranks):,} processes and "
                f"{trainer.world_size:,} train now: they draw other random numbers than a run that never stopped, and "
                "figures of this epoch's end are those of what is left of it. With the data module's TrainingSampler "
                "no row of the epoch is trained twice"
            )

        self.loader_states: list[dict[str, Any]] | None = self.mine.get("loaders")
        self.leaves_out_fetched = "fetched" in self.mine and self.mine["fetched"] is None
        """Whether batches that were fetched before the save could not be saved."""
        self.is_epoch_done = self.point in _EPOCH_DONE
        self._positions: OwnPositions | None = None
        self._streams_of: list[Any] | None = None
        self._reloads: list[float] = self.resume.get("reloads") or []

    def install(self) -> None:
        """To be called before the loops are restored."""
        loop = self.trainer.fit_loop
        _once(loop, "reset", self._reset)
        _once(loop, "on_run_start", self._on_run_start)
        if self.point in _IN_EPOCH:
            _once(loop.epoch_loop, "advance", self._advance)
        if self.point != "elsewhere":
            self._give_sanity_check_back = skip_sanity_check(self.trainer)
        if self._reloads and self.trainer.reload_dataloaders_every_n_epochs:
            for owner, epoch in zip((loop, loop.epoch_loop.val_loop), self._reloads, strict=True):
                self._make_loaders_as_in(owner, epoch)
        self._give_searches_back = skip_searches(self.trainer, self.batch_size)
        self._prepare_the_loader()

    def explained(self) -> AbstractContextManager[None]:
        """For what is done with the guard's state elsewhere: what goes wrong there ends in a sentence as well."""
        return _explained(self.trainer)

    def uninstall(self) -> None:
        """Gives the loops their own methods back."""
        loop = self.trainer.fit_loop
        inner = loop.epoch_loop
        methods = (loop, ("setup_data", "reset", "on_run_start")), (inner, ("reset", "advance", "on_run_start"))
        for owner, names in (*methods, (inner.val_loop, ("setup_data",))):
            for name in names:
                vars(owner).pop(name, None)
        self._give_searches_back()
        self._give_sanity_check_back()

    # In the order in which they are called

    def _reset(self) -> None:
        loop = self.trainer.fit_loop
        batch = loop.epoch_loop.batch_progress
        if self.point == "in_step":
            self._take_step_back()
        if self._streams_of is not None:
            loop._combined_loader.flattened, self._streams_of = self._streams_of, None
            _once(loop.epoch_loop, "on_run_start", self._begin_streams)
        if self._load_states is not None:
            loop._load_combined_loader_states = self._load_states
        if loop._data_fetcher is not None and not self.is_epoch_done:
            self._go_on_in_loader()
        is_over = self.is_epoch_done or (self.point in _IN_EPOCH and batch.is_last_batch)
        if is_over and self._positions is not None:
            self._positions.take_back_fetched()
        self._positions = None
        if self._reloads:
            loop._last_train_dl_reload_epoch = self._reloads[0]
        spent = self.point == "elsewhere" and batch.is_last_batch and batch.current.completed < batch.current.processed
        begun = batch.total.started
        if self.point in _IN_EPOCH:
            for tracker in (batch.total, batch.current):
                tracker.completed = tracker.processed
            # A batch of None is never started, and Lightning tells by that where it stands.
            batch.total.started = batch.total.ready
        elif self.point in _EPOCH_DONE:
            _set_restarting(loop, False)
        loop.reset()
        batch.total.started = begun
        if self.point in _EPOCH_DONE:
            loop._resuming_from_checkpoint = False  # so that the epoch's iterator is made when it always is
        elif spent:
            begin_epoch_anew(self.trainer)

    def _on_run_start(self) -> None:
        loop = self.trainer.fit_loop
        self._give_sanity_check_back()
        with _explained(self.trainer):
            restore_frozen(self.trainer, self.resume.get("frozen"))
        loop.on_run_start()
        if self._reloads:
            loop.epoch_loop.val_loop._last_val_dl_reload_epoch = self._reloads[1]
        elsewhere_inside = self.point == "elsewhere" and loop.restarted_mid_epoch
        begin_epoch_in_callbacks(self.trainer, inside=self.point in _IN_EPOCH or elsewhere_inside)
        has_epoch = bool(self.mine.get("epoch"))
        with _explained(self.trainer):
            self._restore_all()
        if self.when_restored is not None:
            self.when_restored()
        self.mine, self.loader_states = {}, None  # gradients are as large as the model
        if self.point == "epoch_end" and has_epoch:
            self._end_epoch()
        if self.point in _EPOCH_DONE:
            self._restore_early_stop()
        elif self.point in _IN_EPOCH:
            batch = loop.epoch_loop.batch_progress.current
            self.trainer._logger_connector._first_loop_iter = batch.ready == 1 if batch.ready else None

    def _restore_all(self) -> None:
        parts = Parts(self.trainer.lightning_module)
        self._make_lasting_workers()
        restore_generators(self.trainer, self.mine.get("generators", {}))
        if self.mine.get("epoch"):
            restore_epoch_state(self.trainer, parts, self.mine["epoch"])
        restore_modes(parts, self.resume.get("module"))
        restore_options(parts, self.options)
        self._restore_gradients()
        self._restore_statistics(parts)
        if self.mine.get("random_state"):
            restore_random_state(self.mine["random_state"])

    def _advance(self, *args: Any, **kwargs: Any) -> None:
        """Ends the batch that was saved in; `on_advance_end` follows, with the validation that is due."""
        loop = self.trainer.fit_loop.epoch_loop
        loop.val_loop.restarting = False
        self.trainer.fit_loop._restarting = False  # else schedulers that go by a metric would not step at its end
        if self.point in ("after_batch", "in_step"):
            _set_restarting(loop, False)
            loop.advance(*args, **kwargs)
            return
        self._restore_early_stop()
        if self.point == "validation_end":
            loop._skip_next_val = True
            return
        self.trainer._logger_connector.on_batch_end()
        self.trainer._logger_connector.update_train_step_metrics()

    # Parts

    def _take_step_back(self) -> None:
        """Counts the step that was under way as not begun, and its batch as not taken if it comes again.

        Lightning does so in the counters of the epoch only, and loggers go on one step later.
        """
        loop = self.trainer.fit_loop.epoch_loop
        batch = loop.batch_progress
        if self.mine.get("fetched") or not any(map(has_state, loaders_of(self.trainer.fit_loop))):
            batch.is_last_batch = False
        else:  # the loader goes on behind it
            batch.total.completed, batch.current.completed = batch.total.ready, batch.current.ready
        optimizer = loop.automatic_optimization.optim_progress.optimizer
        by_hand = loop.manual_optimization.optim_step_progress
        for progress in (batch, optimizer.step, optimizer.zero_grad, by_hand):
            progress.total.reset_on_restart()
            progress.current.reset_on_restart()

    def _make_loaders_as_in(self, owner: Any, epoch: float) -> None:
        """When the loops are restored; before that a schedule may have asked for the training loader's length."""

        def set_up() -> None:
            if not getattr(self.trainer.fit_loop, "_loaded_from_state_dict", True):
                owner.setup_data()
                self._make_loaders_as_in(owner, epoch)
                return
            with as_if_in(self.trainer, epoch):
                owner.setup_data()

        _once(owner, "setup_data", set_up)

    def _prepare_the_loader(self) -> None:
        """Whenever the training loader is made before the loops are reset, and before its iterator is.

        It is made twice where a schedule asks for its length and loaders are made anew by epoch.
        """
        loop = self.trainer.fit_loop
        prepare = self._restore_order if self.mine.get("order") else self._give_fetched_first
        wanted = self.mine.get("order") or self.mine.get("fetched")
        if not hasattr(loop, "_load_combined_loader_states"):
            return
        before = self._load_states = loop._load_combined_loader_states

        def load() -> None:
            before()
            if self.is_epoch_done:
                self._begin_no_stream()
            self._positions = OwnPositions(self.trainer)
            if wanted:
                prepare()

        loop._load_combined_loader_states = load

    def _go_on_in_loader(self) -> None:
        """Where the training loader was made before the loops were restored: for a schedule, or as early as `setup`."""
        loop = self.trainer.fit_loop
        if self.mine.get("order") and self.order_kept is None:
            self._restore_order()
        elif self.mine.get("fetched") and loop.restarting and loop._combined_loader_states_to_load:
            loop._load_combined_loader_states()
            self._give_fetched_first()
        else:
            return
        iter(loop._data_fetcher)

    def _begin_no_stream(self) -> None:
        """Lets Lightning make its first iterator without the loaders of streams: at an epoch's end none of it is used.

        The epoch's own is made when it always is. A data set that gives its rows once, such as one that reads from a
        queue, would lose what was fetched for the first (#19427).
        """
        loop = self.trainer.fit_loop
        loaders = loop._combined_loader.flattened
        streams = [isinstance(getattr(loader, "dataset", None), IterableDataset) for loader in loaders]
        if not any(streams):
            return
        loop._combined_loader.flattened = [_NotBegun(x) if s else x for x, s in zip(loaders, streams, strict=True)]
        self._streams_of = loaders

    def _begin_streams(self, data_fetcher: Any) -> None:
        """Workers that last draw their seed when they start, which they did in the run that never stopped."""
        loop = self.trainer.fit_loop.epoch_loop
        starts = any(
            getattr(loader, "persistent_workers", False) and getattr(loader, "_iterator", None) is None
            for loader in self.trainer.fit_loop._combined_loader.flattened
        )
        drawn = torch.get_rng_state()
        loop.on_run_start(data_fetcher)
        if starts:
            torch.set_rng_state(drawn)

    def _give_fetched_first(self) -> None:
        (loader,) = loaders_of(self.trainer.fit_loop)
        with _explained(self.trainer):
            pieces = in_pieces(list(self.mine["fetched"]), self.batch_size, getattr(loader, "batch_size", None))
            give_first(self.trainer, pieces)
        self.mine = {**self.mine, "fetched": pieces}

    def _restore_order(self) -> None:
        with _explained(self.trainer):
            self.order_kept = restore_order(self.trainer, self.mine["order"])
        if self.order_kept:
            _once(self.trainer.fit_loop.epoch_loop, "reset", self._reset_quietly)

    def _reset_quietly(self) -> None:
        """Without what Lightning says of loaders that keep no position, which is not so."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
            self.trainer.fit_loop.epoch_loop.reset()

    def _end_epoch(self) -> None:
        """The rest of `FitLoop.on_advance_end`, after the callbacks."""
        loop, connector = self.trainer.fit_loop, self.trainer._logger_connector
        epoch = loop.epoch_progress
        for tracker in (epoch.total, epoch.current):
            tracker.completed = tracker.processed - 1
        connector.epoch_end_reached()
        connector.on_epoch_end()
        if loop.epoch_loop._num_ready_batches_reached():
            loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        loop.epoch_loop._batches_that_stepped -= 1
        connector.update_train_epoch_metrics()
        loop.epoch_loop._batches_that_stepped += 1
        epoch.increment_completed()

    def count_batches_of_another_size(self) -> None:
        """Lets the epoch end when its loader does, where batches are not of the size that the epoch began with.

        To be called at `on_train_start`, once the loader stands at its position.
        """
        loop = self.trainer.fit_loop
        if self.point not in _IN_EPOCH or loop._combined_loader is None or loop.max_batches == math.inf:
            return
        counted = [n for n in map(self._left_of, loop._combined_loader.flattened) if n is not None]
        if not counted:
            return
        left = max(counted) + len(self.mine.get("fetched") or ())  # which come first
        batch = loop.epoch_loop.batch_progress.current
        rank_zero_warn(
            f"CheckpointGuard: this epoch began with batches of another size; after {batch.ready:,} of those, "
            f"{left:,} of {loop.max_batches:,} are left of the size of now, with the rows not trained in it yet. "
            "The run is not the one that never stopped"
        )
        if left and self.point not in ("after_batch", "in_step") and not loop.epoch_loop._should_accumulate():
            loop.epoch_loop._batches_that_stepped += 1  # as after the batch of the save, of which nothing is done again
        done = max(0, loop.max_batches - left)
        total = loop.epoch_loop.batch_progress.total
        total.ready = total.started = total.processed = total.completed = total.ready + done - batch.ready
        batch.ready = batch.started = batch.processed = batch.completed = done
        if left:
            self.point = "after_batch"  # the validation that the save came before belongs to other batches
        self.mine = {**self.mine, "gradients": {}}

    def _left_of(self, loader: Any) -> int | None:
        """The batches that are left of an epoch that began with those of another size; None where nobody knows.

        A TrainingSampler counts them, and other positions of a StatefulDataLoader are in rows.
        """
        size: int | None = getattr(loader, "batch_size", None)
        left: int | None = getattr(getattr(loader, "sampler", None), "batches_left", None)
        if left is not None or not size or self.batch_size in (None, size):
            return left
        if self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return 0
        given = rows_given(loader, size)
        if given is None or isinstance(loader.dataset, IterableDataset):
            return None
        rows: int = max(0, len(loader.sampler) - given)
        return rows // size if loader.drop_last else -(-rows // size)

    def _restore_gradients(self) -> None:
        gradients = self.mine.get("gradients", {})
        if gradients is None:
            rank_zero_warn(
                "CheckpointGuard: the checkpoint was saved inside an accumulation window, and the gradients of its "
                f"batches are not in it, since {type(self.trainer.strategy).__name__} shards them: the next step uses "
                "those of the window's last batches only"
            )
        elif gradients:
            restore_gradients(self.trainer, gradients)

    def _restore_statistics(self, parts: Parts) -> None:
        saved = self.mine.get("statistics", {})
        for name, tensor in running_statistics(parts).items() if saved else ():
            tensor.copy_(saved.get(name, tensor))
        if hasattr(self.trainer.model, "require_forward_param_sync") and "sync_before_forward" in self.mine:
            self.trainer.model.require_forward_param_sync = self.mine["sync_before_forward"]

    def _restore_early_stop(self) -> None:
        if self.resume.get("early_stop"):
            rank_zero_info("CheckpointGuard: early stopping had ended this run when the checkpoint was saved")
            self.trainer.should_stop = True

    def _make_lasting_workers(self) -> None:
        """Persistent workers of validation draw their seed once, when they start: before the random state is set."""
        loaders = loaders_of(self.trainer.fit_loop.epoch_loop.val_loop)
        for had, loader in zip(self.resume.get("validation_workers", []), loaders, strict=False):
            if had and getattr(loader, "_iterator", None) is None:
                iter(loader)


class _NotBegun:
    """In a loader's place while Lightning makes an iterator that no batch is taken from."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return len(self._loader)


@contextmanager
def _explained(trainer: Trainer) -> Iterator[None]:
    """Says of which checkpoint it is, where what the guard has saved was changed since: no rule judges all of it."""
    try:
        yield
    except (EnStackError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as e:
        raise CheckpointGuardError(
            f"the state of CheckpointGuard in checkpoint {trainer.ckpt_path} cannot be restored, as it is not what the "
            f"guard saves or not of this run: {type(e).__name__}: {e}. Use another checkpoint"
        ) from e


def _begin_epoch_that_was_prepared(loops: dict[str, Any]) -> None:
    """Takes back that an epoch was prepared in which no batch was begun: Lightning takes that for the one before."""
    trackers = [loops.get("epoch_progress", {}).get(part) or {} for part in ("total", "current")]
    counts = [[t.get(name) for name in ("ready", "started", "processed", "completed")] for t in trackers]
    if all(isinstance(ready, int) and [*rest] == [ready - 1] * 3 for ready, *rest in counts):
        for tracker in trackers:
            tracker["ready"] -= 1


def _of_others(rank_zero: dict[str, Any]) -> dict[str, Any]:
    """What other processes can use of rank 0's part: the figures that callbacks have seen last."""
    seen = (rank_zero.get("epoch") or {}).get("seen")
    return {"epoch": {"seen": seen, "results": {}, "metrics": {}}} if seen else {}


def _once(owner: Any, name: str, instead: Callable[..., None]) -> None:
    """Puts a function in a method's place for the next call; inside it, the method is the owner's own again."""

    def call(*args: Any, **kwargs: Any) -> None:
        vars(owner).pop(name, None)
        instead(*args, **kwargs)

    setattr(owner, name, call)


def _set_restarting(loop: Any, restarting: bool) -> None:
    """For a loop and those in it; `FitLoop` says yes by itself wherever `max_steps` is set."""
    loop._restarting = restarting
    for inner in vars(loop).values():
        if hasattr(inner, "_restarting") and hasattr(inner, "on_iteration_done"):
            _set_restarting(inner, restarting)
