"""A plan whose codes are to be chosen by a calibration: which weights, and whether it fits."""

from __future__ import annotations

from dataclasses import replace

from layerpack.convert.plan.plan import Action, ConversionPlan, Item
from layerpack.formats.blob.layout import Nf4Spec
from layerpack.formats.calibration.calibration import Calibration
from layerpack.formats.errors import CalibrationError
from layerpack.formats.manifest.facts import Calibrated


def calibrated(plan: ConversionPlan, calibration: Calibration) -> tuple[ConversionPlan, set[str]]:
    """The plan that says so, and the names of the weights that the calibration is used for.

    Raises CalibrationError if it is another model's, or if there is nothing to use it for.
    """
    record, structure, where = calibration.record, plan.structure, calibration.path
    if (record.architecture, record.num_layers) != (
        structure.architecture,
        len(structure.layers),
    ):
        raise CalibrationError(
            f"{where}: of a {record.architecture} with {record.num_layers} layers, not of a "
            f"{structure.architecture} with {len(structure.layers)}"
        )
    items = [item for blob in plan.blobs for item in blob.items if item.action is Action.QUANTISE]
    if plan.quantization is None or not items:
        raise CalibrationError(
            f"{where}: the source's weights are NF4 already, their codes stay; leave out "
            "--calibration, or convert the 16-bit checkpoint"
        )
    for item in items:
        _check_columns(item, calibration)
    names = {item.spec.name for item in items if _fits(item, calibration)}
    if not names:
        raise CalibrationError(f"{where}: knows the inputs of none of this model's weights")
    used = Calibrated(
        digest=calibration.digest,
        text=record.text,
        num_tokens=record.num_tokens,
        num_weights=len(names),
    )
    left = len(items) - len(names)
    why = "(inputs not known, or rows that are not whole blocks)"
    plain = f"; {left} get the nearest codes {why}" if left else ""
    note = f"{len(names)} weights are calibrated with {record.num_tokens} tokens{plain}"
    plan = replace(
        plan,
        quantization=replace(plan.quantization, calibration=used),
        notes=(*plan.notes, note),
    )
    return plan, names


def _check_columns(item: Item, calibration: Calibration) -> None:
    inputs = calibration.users.get(item.spec.name)
    if inputs is None:
        return
    known, columns = calibration.num_columns[inputs], item.spec.shape[-1]
    if known != columns:
        raise CalibrationError(
            f"{calibration.path}: {item.spec.name} has {columns} inputs, there {known}: "
            "another model's"
        )


def _fits(item: Item, calibration: Calibration) -> bool:
    """Blocks that go over the end of a row have no inputs of their own."""
    spec = item.spec
    return (
        isinstance(spec, Nf4Spec)
        and len(spec.shape) == 2
        and spec.shape[1] % spec.block_size == 0
        and spec.name in calibration.users
    )
