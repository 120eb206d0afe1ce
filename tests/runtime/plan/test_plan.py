"""What every plan must keep, on machines and models of all sizes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerpack.formats.errors import CapacityError
from layerpack.formats.units import GIB, MIB
from layerpack.runtime.core.slices import Kind, Slice
from layerpack.runtime.machine.machine import Machine
from layerpack.runtime.plan.plan import NUM_BUFFERS, Limits, Needs, Plan, Tier
from layerpack.runtime.plan.policy import make_plan
from layerpack.runtime.plan.spread import spread

LAYER = 450 * MIB


def make_slices(sizes: list[int]) -> tuple[Slice, ...]:
    return tuple(
        Slice(
            index=index,
            kind=Kind.LAYER,
            number=index,
            path=Path(f"layer-{index}"),
            offset_bytes=4096,
            length_bytes=size,
        )
        for index, size in enumerate(sizes)
    )


def machine(vram: int | None, ram: int, *, link: float = 25.0, disk: float = 6.0) -> Machine:
    return Machine(
        device="test",
        vram_free_bytes=vram,
        host_free_bytes=ram,
        host_total_bytes=ram * 5 // 4,
        link_gb_s=link,
        disk_gb_s=disk,
    )


BIG = make_slices([LAYER] * 80 + [LAYER - MIB] * 5 + [200 * MIB])
NEEDS = Needs(cache_bytes=GIB, activation_bytes=GIB // 4, decode_bytes=GIB // 2, constant_bytes=MIB)

any_slices = st.lists(st.integers(1, 64 * MIB), min_size=1, max_size=40).map(make_slices)
like_models = st.builds(
    lambda layers, each, parts, last: make_slices([each] * (layers + parts) + [last % each + 1]),
    st.integers(1, 60),
    st.integers(MIB, 512 * MIB),
    st.integers(0, 8),
    st.integers(0, 1 << 40),
)
sizes = st.integers(0, 48 * GIB)
limits = st.builds(
    Limits,
    vram_bytes=st.none() | sizes,
    ram_bytes=st.none() | sizes,
    num_slots=st.integers(2, 6),
    vram_slices=st.none() | st.integers(0, 50),
    host_slices=st.none() | st.integers(0, 50),
)
needs = st.builds(Needs, cache_bytes=st.integers(0, GIB), activation_bytes=st.integers(0, GIB))


def try_plan(slices: tuple[Slice, ...], where: Machine, **arguments: object) -> Plan | None:
    try:
        return make_plan(slices, machine=where, **arguments)  # type: ignore[arg-type]
    except CapacityError:
        return None


@given(any_slices | like_models, st.none() | sizes, sizes, needs, limits)
def test_no_budget_is_exceeded_and_every_slice_has_a_place(
    slices: tuple[Slice, ...], vram: int | None, ram: int, needs: Needs, limits: Limits
) -> None:
    found = try_plan(slices, machine(vram, ram), needs=needs, limits=limits)
    if found is None:
        return
    assert len(found.tiers) == len(slices)
    room = {tier: sum(part.slot_bytes for part in found.slices_in(tier)) for tier in Tier}
    assert sum(found.bytes_in(tier) for tier in Tier) == sum(part.length_bytes for part in slices)
    ring = found.num_buffers * found.buffer_bytes
    if vram is None:
        assert room[Tier.VRAM] == 0
        # A pack that fits is used where it is mapped; else slots and ring are host memory, too.
        taken = needs.total_bytes + ring + found.num_slots * found.slot_bytes
        assert room[Tier.HOST] == 0 or room[Tier.HOST] + taken <= ram
    else:
        allowed = vram if limits.vram_bytes is None else min(vram, limits.vram_bytes)
        slots = found.num_slots * found.slot_bytes
        assert room[Tier.VRAM] + slots + needs.total_bytes + found.margin_bytes <= allowed
        assert room[Tier.HOST] == 0 or room[Tier.HOST] + ring <= ram
        assert found.margin_bytes >= 0.03 * allowed - 1
    if limits.ram_bytes is not None:
        assert room[Tier.HOST] <= limits.ram_bytes
    streamed = Tier.DISK in found.tiers or (vram is not None and Tier.HOST in found.tiers)
    assert (found.num_slots >= 2) == streamed
    assert found.disk_bytes == found.bytes_in(Tier.DISK)
    assert found.num_buffers == (NUM_BUFFERS if found.disk_bytes else 0)


@given(any_slices | like_models, st.none() | sizes, sizes, needs, limits)
def test_overrides_are_respected_or_refused(
    slices: tuple[Slice, ...], vram: int | None, ram: int, needs: Needs, limits: Limits
) -> None:
    found = try_plan(slices, machine(vram, ram), needs=needs, limits=limits)
    if found is None:
        return
    rest = len(slices)
    if limits.vram_slices is not None and vram is not None:
        assert len(found.slices_in(Tier.VRAM)) == min(limits.vram_slices, rest)
    rest -= len(found.slices_in(Tier.VRAM))
    if limits.host_slices is not None:
        assert len(found.slices_in(Tier.HOST)) == min(limits.host_slices, rest)


@given(like_models, sizes, sizes, sizes, sizes, needs, st.integers(2, 4))
def test_more_memory_never_makes_a_pass_slower(
    slices: tuple[Slice, ...],
    vram: int,
    more_vram: int,
    ram: int,
    more_ram: int,
    needs: Needs,
    num_slots: int,
) -> None:
    limits = Limits(num_slots=num_slots)
    plans = [
        try_plan(slices, machine(v, r), needs=needs, limits=limits)
        for v, r in ((vram, ram), (vram + more_vram, ram), (vram + more_vram, ram + more_ram))
    ]
    for less, more in itertools.pairwise(plans):
        if less is not None:
            assert more is not None
            assert more.link_s <= less.link_s
            assert more.disk_s <= less.disk_s


@given(like_models, sizes, sizes)
def test_more_memory_never_makes_a_cpu_read_more(
    slices: tuple[Slice, ...], ram: int, more_ram: int
) -> None:
    less = try_plan(slices, machine(None, ram))
    more = try_plan(slices, machine(None, ram + more_ram))
    assert less is None or (more is not None and more.disk_bytes <= less.disk_bytes)


@given(st.integers(0, 200), st.integers(0, 200))
def test_spread_is_as_even_as_whole_numbers_allow(count: int, more: int) -> None:
    total = count + more
    places = spread(count, total)
    assert len(set(places)) == count
    assert all(0 <= place < total for place in places)
    gaps = [after - before for before, after in itertools.pairwise(places)]
    if gaps:
        # Around the end of a pass into the next one as well.
        gaps.append(places[0] + total - places[-1])
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("vram_gib", [6, 8, 12, 24])
def test_each_tier_is_spread_over_the_whole_pass(vram_gib: int) -> None:
    found = make_plan(BIG, machine=machine(vram_gib * GIB, 20 * GIB), needs=NEEDS)
    for tier in Tier:
        places = [place for place, where in enumerate(found.tiers) if where is tier]
        if len(places) > 1:
            longest = max(b - a for a, b in itertools.pairwise(places))
            # A tier chosen from what another one left can be uneven by that one's places.
            assert longest <= -(-len(BIG) // len(places)) + 2


def test_a_laptop_keeps_room_for_its_desktop() -> None:
    # 16 GB of RAM of which a browser and the system hold 3.5.
    where = replace(machine(int(7.5e9), int(12.5e9)), host_total_bytes=16_000_000_000)
    found = make_plan(BIG, machine=where, needs=NEEDS)
    pinned = found.bytes_in(Tier.HOST) + found.num_buffers * found.buffer_bytes
    assert 7e9 < pinned < 12.5e9 - 2.5e9
    assert set(found.tiers) == set(Tier)


def test_a_pack_smaller_than_memory_is_wholly_in_host_memory() -> None:
    total = sum(part.slot_bytes for part in BIG)
    found = make_plan(
        BIG, machine=machine(8 * GIB, 64 * GIB), needs=NEEDS, limits=Limits(vram_slices=0)
    )
    assert set(found.tiers) == {Tier.HOST}
    assert found.disk_bytes == found.num_buffers == 0
    # Nor is room for a ring that nothing needs a reason to leave one slice on disk.
    exact = make_plan(
        BIG, machine=machine(8 * GIB, total), needs=NEEDS, limits=Limits(ram_bytes=total)
    )
    assert Tier.DISK not in exact.tiers


def test_a_limit_that_somebody_sets_is_taken_at_their_word() -> None:
    where = machine(8 * GIB, 12 * GIB)
    usual = make_plan(BIG, machine=where, needs=NEEDS)
    asked = make_plan(BIG, machine=where, needs=NEEDS, limits=Limits(ram_bytes=11 * GIB))
    assert usual.bytes_in(Tier.HOST) < asked.bytes_in(Tier.HOST) <= 11 * GIB


def test_all_resident_takes_no_slots() -> None:
    small = make_slices([100 * MIB] * 10)
    found = make_plan(small, machine=machine(1100 * MIB, 32 * GIB), needs=Needs())
    assert set(found.tiers) == {Tier.VRAM}
    assert found.num_slots == found.slot_bytes == found.streamed_bytes == 0
    assert found.pass_s == 0


@pytest.mark.parametrize(("free_mib", "slots"), [(950, 2), (1500, 3), (1900, 4), (9000, 4)])
def test_as_many_slots_as_fit_come_before_resident_layers(free_mib: int, slots: int) -> None:
    vram = int(free_mib * MIB / 0.96) + 1
    found = make_plan(
        BIG, machine=machine(vram, 64 * GIB), needs=Needs(), limits=Limits(num_slots=4)
    )
    assert found.num_slots == slots
    assert (Tier.VRAM in found.tiers) == (free_mib == 9000)


@pytest.mark.parametrize(
    ("vram", "limits", "words"),
    [
        (
            2 * GIB,
            Limits(),
            r"2\.1 GB of VRAM are 794\.0 MB too few: layers on the way take 943\.7 MB, KV cache "
            r"1\.1 GB, activations 268\.4 MB, decoding 536\.9 MB, constants 1\.0 MB, and "
            "4% must stay free; lower --context or free some VRAM$",
        ),
        (
            8 * GIB,
            Limits(vram_bytes=2 * GIB),
            r"2\.1 GB of VRAM are 794\.0 MB too few: .*; lower --context or raise --vram$",
        ),
        (2 * GIB, Limits(vram_bytes=8 * GIB), "; lower --context, raise --vram or free some VRAM$"),
        (8 * GIB, Limits(vram_slices=60), r"60 layers take 28\.\d GB, but 5\.\d GB of VRAM"),
        (8 * GIB, Limits(host_slices=80), r"7\d layers take 3\d\.\d GB, but 16\.6 GB of host"),
        (None, Limits(vram_slices=3), r"^3 layers are to be kept in VRAM, which a CPU does not ha"),
        (None, Limits(host_slices=80), r"80 layers take 37\.\d GB, but 13\.8 GB of host memory"),
    ],
)
def test_refusals_name_the_figures(vram: int | None, limits: Limits, words: str) -> None:

    with pytest.raises(CapacityError, match=words):
        make_plan(BIG, machine=machine(vram, 16 * GIB), needs=NEEDS, limits=limits)


def test_what_is_missing_by_the_figures_is_enough() -> None:
    missing = 794_000_000
    with pytest.raises(CapacityError):
        make_plan(BIG, machine=machine(2 * GIB, 16 * GIB), needs=NEEDS)
    make_plan(BIG, machine=machine(2 * GIB + missing, 16 * GIB), needs=NEEDS)


def test_a_cpu_without_room_for_the_context_refuses_it() -> None:
    needs = Needs(cache_bytes=4 * GIB)
    with pytest.raises(CapacityError, match=r"4\.3 GB of host memory are .*") as error:
        make_plan(BIG, machine=machine(None, 4 * GIB), needs=needs)
    said = str(error.value)
    assert "KV cache 4.3 GB" in said and "%" not in said  # a margin is only left in VRAM
