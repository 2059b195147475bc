"""Every rule speaks: on a file that a real library wrote it is silent or passes, and on the same file with one fault it
tells the fault.

The other tests of rules go into what each says; this table sees to it that none is without a real file.
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from builders import TinyModule, edited, enstack_folder, every_step, flip_bit, quiet_trainer, truncate
from genuine import huggingface_trainer

from enstack_lightning.checkpoint import RULES, Options, Report, Severity, verify_checkpoint
from enstack_lightning.checkpoint.manifest import manifest_path, write_manifest
from enstack_lightning.guard import CheckpointGuard

pytestmark = pytest.mark.filterwarnings("ignore")

Damage = Callable[[Path], object]


def torch_file(edit: Callable[[dict[str, Any]], object], name: str = "") -> Damage:
    """Loads the torch file, edits it, and has torch save it again."""
    return lambda path: edited(path / name if name else path, path / name if name else path, edit)


def json_file(name: str, **entries: Any) -> Damage:
    def damage(folder: Path) -> None:
        value = {**json.loads((folder / name).read_text()), **entries}
        (folder / name).write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))

    return damage


def optimizer(edit: Callable[[dict[str, Any]], object]) -> Damage:
    return torch_file(lambda c: edit(c["optimizer_states"][0]))


def group(**entries: Any) -> Damage:
    return optimizer(lambda o: o["param_groups"][0].update(entries))


def scheduler(**entries: Any) -> Damage:
    return torch_file(lambda c: c["lr_schedulers"][0].update(entries))


def loops(c: dict[str, Any]) -> Any:
    return c["loops"]["fit_loop"]


def repacked(path: Path) -> None:
    with zipfile.ZipFile(path) as source:
        records = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name, data in records.items():
            target.writestr(name, data)


def exchanged(path: Path) -> None:
    """A record's bytes replaced, with the right CRC-32 everywhere."""
    old = torch.load(path, weights_only=True)["state_dict"]["layer.bias"].numpy().tobytes()
    new = bytes(len(old))
    data = path.read_bytes().replace(old, new)
    path.write_bytes(data.replace(zlib.crc32(old).to_bytes(4, "little"), zlib.crc32(new).to_bytes(4, "little")))


def with_protocol_4(path: Path) -> None:
    torch.save(torch.load(path, weights_only=True), path, pickle_protocol=4)


def saved_as_before_torch_1_6(path: Path) -> None:
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)


def odd_tensor(c: dict[str, Any]) -> None:
    c["state_dict"]["extra"] = torch.zeros(1).expand(2**40)


def add_class(c: dict[str, Any]) -> None:
    c["hyper_parameters"] = argparse.Namespace(width=3)


def other_size(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def tampered_metadata(folder: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = argparse.Namespace(a=1)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@dataclass(frozen=True)
class Fault:
    """One way to make a rule speak.

    Attributes:
        base: the real checkpoint: a fixture's key in `BASES`.
        damage: what is done to a copy of it; None where the options alone make the difference.
        says: the severity that the rule then has.
        options: how the damaged one is verified, and the good one too, but for what `before` says.
    """

    base: str
    damage: Damage | None
    says: str = "error"
    options: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] | None = None


def run(**sections: dict[str, Any]) -> dict[str, Any]:
    return {"options": {"run_config": sections}, "before": {"run_config": {}}}


FAULTS: dict[str, Fault] = {
    "CK101": Fault("enstack", lambda p: (p / "config.json").unlink()),
    "CK102": Fault("lightning", lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n")),
    "CK103": Fault("lightning", lambda p: p.write_bytes(b"")),
    "CK104": Fault("lightning", lambda p: truncate(p, p.stat().st_size - 1)),
    "CK105": Fault("lightning", lambda p: flip_bit(p, 3_000)),
    "CK106": Fault("lightning", lambda p: (p.unlink(), p.symlink_to(p.name))),
    "CK108": Fault("lightning", saved_as_before_torch_1_6, "info"),
    "CK109": Fault("enstack", lambda p: (p / "training_state.pth.tmp").touch(), "warning"),
    "CK110": Fault("lightning", exchanged),
    "CK111": Fault("lightning", repacked, "warning"),
    "CK201": Fault("lightning", torch_file(lambda c: c.pop("loops"))),
    "CK202": Fault("enstack", torch_file(lambda c: c.pop("total_batches"), "training_state.pth"), "warning"),
    "CK203": Fault("lightning", torch_file(lambda c: c["state_dict"].clear())),
    "CK204": Fault("lightning", scheduler(last_epoch="seven")),
    "CK205": Fault(
        "lightning", torch_file(lambda c: (c.pop("optimizer_states"), c.pop("lr_schedulers"), c.pop("loops")))
    ),
    "CK206": Fault("trainer", lambda p: (p / "rng_state.pth").rename(p / "rng_state_1.pth"), "warning"),
    "CK301": Fault("lightning", torch_file(lambda c: c.update(epoch=-1))),
    "CK302": Fault("lightning", torch_file(lambda c: c.update(global_step=6))),
    "CK303": Fault(
        "lightning",
        torch_file(
            lambda c: loops(c)["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"].update(
                ready=8
            )
        ),
        "warning",
    ),
    "CK304": Fault("enstack", torch_file(lambda c: c.update(best_val_f1=1.5), "training_state.pth")),
    "CK305": Fault("lightning", torch_file(lambda c: loops(c)["state_dict"].update(combined_loader=[])), "warning"),
    "CK306": Fault("trainer", json_file("trainer_state.json", epoch=0.4), "warning"),
    "CK401": Fault("lightning", optimizer(lambda o: [s.update(step=torch.tensor(9.0)) for s in o["state"].values()])),
    "CK402": Fault("lightning", optimizer(lambda o: o["state"].clear())),
    "CK403": Fault("lightning", optimizer(lambda o: o["state"][0].update(step=torch.tensor(3.0))), "warning"),
    "CK404": Fault("lightning", optimizer(lambda o: o["state"].update({7: o["state"][0]}))),
    "CK405": Fault("lightning", optimizer(lambda o: o["state"][0].update(exp_avg=torch.zeros(3, 3)))),
    "CK406": Fault("lightning", torch_file(lambda c: c["state_dict"].pop("layer.bias"))),
    "CK407": Fault("lightning", group(weight_decay=-0.1)),
    "CK408": Fault("lightning", optimizer(lambda o: o["state"][0].pop("exp_avg_sq"))),
    "CK501": Fault("lightning", scheduler(last_epoch=3), "warning"),
    "CK502": Fault("lightning", group(lr=1.0), "warning"),
    "CK503": Fault("lightning", scheduler(_last_lr=[1e-4]), "warning"),
    "CK504": Fault(
        "one cycle",
        torch_file(
            lambda c: (
                c["lr_schedulers"][0].update(_last_lr=[5e-3]),
                c["optimizer_states"][0]["param_groups"][0].update(lr=5e-3),
            )
        ),
        "warning",
    ),
    "CK505": Fault("one cycle", scheduler(total_steps=10)),
    "CK601": Fault("trainer", json_file("config.json", id2label={"0": "a", "1": "b"})),
    "CK602": Fault("trainer", json_file("config.json", num_hidden_layers=3)),
    "CK603": Fault(
        "lightning", torch_file(lambda c: c["state_dict"]["layer.bias"].fill_(float("nan"))), "error", {"deep": True}
    ),
    "CK604": Fault("lightning", torch_file(lambda c: c["state_dict"]["layer.bias"].zero_()), "info", {"deep": True}),
    "CK605": Fault("lightning", torch_file(odd_tensor), "warning"),
    "CK701": Fault("lightning", torch_file(add_class)),
    "CK702": Fault("lightning", torch_file(add_class), "info", {"allow_globals": {"argparse.Namespace"}}),
    "CK703": Fault("bare trainer", lambda p: torch.save(argparse.Namespace(a=1), p / "training_args.bin"), "info"),
    "CK705": Fault("lightning", with_protocol_4),
    "CK801": Fault("with a manifest", other_size),
    "CK802": Fault("with a manifest", lambda p: manifest_path(p).write_text("{")),
    "CK901": Fault("trainer", None, "error", **run(model={"hidden_size": 32})),
    "CK902": Fault("trainer", None, "error", **run(model={"num_labels": 2})),
    "CK903": Fault("trainer", None, "warning", **run(data={"train_batch_size": 64})),
    "CK904": Fault("lightning", None, "warning", **run(trainer={"accumulate_grad_batches": 2})),
    "CK905": Fault("lightning", None, "warning", **run(trainer={"devices": 2})),
    "CK906": Fault("lightning", None, "error", **run(trainer={"max_epochs": 1})),
    "CK907": Fault("lightning", None, "info", **run(trainer={"max_epochs": 9})),
    "CK908": Fault(
        "lightning",
        torch_file(lambda c: c.update(datamodule_hyper_parameters={"vocab_size": 300})),
        **run(data={"vocab_size": 400}),
    ),
    "CK909": Fault("lightning", None, "warning", **run(trainer={"precision": "16-mixed"})),
}


PASSES: dict[str, tuple[str, Damage, dict[str, Any]]] = {
    "CK107": ("lightning", lambda p: flip_bit(p, 3_000), {}),
    "CK506": ("one cycle", torch_file(lambda c: c["lr_schedulers"].clear()), {}),
    "CK704": ("sharded", tampered_metadata, {"purpose": "inference"}),
    "CK803": ("with a manifest", other_size, {}),
}
"""Rules that only ever pass: the real checkpoint on which they do, and a fault after which they are silent."""

_LIVE = "tests/guard/test_after_loading.py: it judges a live run"
ELSEWHERE = {
    "CK100": "tests/faults and test_rules.py: nothing that a real library writes brings it about",
    **{f"CK91{n}": _LIVE for n in range(6)},
    "CK916": "tests/guard/test_dropped_states.py: it judges a live run",
    "CK917": _LIVE,
}


class OneCycle(TinyModule):
    def configure_optimizers(self) -> dict[str, Any]:
        made = torch.optim.AdamW(self.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(made, max_lr=1e-2, total_steps=15)
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.fixture(scope="module")
def bases(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    quiet_trainer(folder, CheckpointGuard(), every_step(folder)).fit(OneCycle())
    (folder / "manifest").mkdir()
    write_manifest(shutil.copy(trained / "step=7.ckpt", folder / "manifest" / "c.ckpt"))
    dcp.save(torch.nn.Linear(4, 2).state_dict(), checkpoint_id=folder / "sharded", no_dist=True)
    trainer = huggingface_trainer(folder / "trainer", 7)
    bare = Path(shutil.copytree(trainer, folder / "bare" / trainer.name))
    (bare / "training_args.bin").unlink()
    return {
        "lightning": trained / "step=7.ckpt",
        "one cycle": folder / "step=7.ckpt",
        "enstack": enstack_folder(folder / "enstack"),
        "trainer": trainer,
        "bare trainer": bare,
        "sharded": folder / "sharded",
        "with a manifest": folder / "manifest" / "c.ckpt",
    }


def copied(base: Path, folder: Path) -> Path:
    """A copy to damage, with its manifest."""
    copy = folder / base.name
    if base.is_dir():
        shutil.copytree(base, copy)
    else:
        shutil.copy(base, copy)
        if manifest_path(base).exists():
            shutil.copy(manifest_path(base), manifest_path(copy))
    return copy


def severities(report: Report, code: str) -> set[str]:
    return {str(f.severity) for f in report.findings if f.code == code}


def test_the_tables_name_every_rule() -> None:
    assert sorted([*FAULTS, *PASSES, *ELSEWHERE]) == sorted(RULES)
    assert {code for code, rule in RULES.items() if rule.severity is Severity.PASS} == {*PASSES}


@pytest.mark.parametrize("code", FAULTS)
def test_a_rule_is_content_with_a_real_checkpoint_and_tells_its_fault(
    code: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    fault = FAULTS[code]
    path = copied(bases[fault.base], tmp_path)
    before = verify_checkpoint(path, Options(**(fault.options if fault.before is None else fault.before)))
    assert severities(before, code) <= {"pass"}, before.findings
    if fault.damage:
        fault.damage(path)
    after = verify_checkpoint(path, Options(**fault.options))
    assert fault.says in severities(after, code), after.findings


@pytest.mark.parametrize("code", PASSES)
def test_a_rule_that_only_passes_does_so_where_all_is_well(code: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base, damage, options = PASSES[code]
    path = copied(bases[base], tmp_path)
    assert severities(verify_checkpoint(path, Options(**options)), code) == {"pass"}
    damage(path)
    assert severities(verify_checkpoint(path, Options(**options)), code) == set()


def test_no_rule_says_worse_than_its_table_tells(bases: dict[str, Path]) -> None:
    order = [*Severity]
    for code, fault in FAULTS.items():
        assert order.index(Severity(fault.says)) <= order.index(RULES[code].severity), code
