"""The owner's part of the settings: what they lend, when, and to whom; and what power costs them."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fallow.model.owner import Profile

Share = Annotated[float, Meta(ge=0, le=100)]
Hours = Annotated[str, Meta(max_length=200)]
Names = Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=200)], ...], Meta(max_length=256)]
Usd = Annotated[float, Meta(ge=0, le=1_000)]
Watts = Annotated[float, Meta(ge=0, le=100_000)]
Kind = Literal["text", "embeddings", "rerank"]

TEMPLATE = """\
[lend]
# When this machine may work for others. A change takes effect at once; `fallow lend status` shows it.
# invisible: stops as soon as somebody uses the machine; balanced: keeps some cores; dedicated: works always;
# night: invisible, from 22 to 7; quiet: half of the cores, and cool.
# `fallow up` takes dedicated unless this line is set: there the machine works for yourself.
# profile = "invisible"
# The most cores that engines use; 0: what the profile says.
# cores = 0
# Local time, such as "22-7" or "12:30-14, 20-8"; empty: what the profile says.
# hours = ""
# The following are the profile's unless they are set.
# others_percent_max = 25      # of all cores, used by anything that isn't ours, before we stop
# resume_after_s = 180         # how long it must be quiet before we go on
# input_idle_s = 180           # how long nobody has touched keyboard or mouse; 0: doesn't matter
# while_fullscreen = false
# while_metered = false
# on_battery = false
# battery_percent_min = 80     # also on mains: let it charge first
# temperature_c_max = 85
# memory_free_percent_min = 15
# disk_free_gb_min = 2
# upload_gb_per_day = 0        # 0: no limit
# leave_after_s = 1800         # after a pause of this length memory is freed too; 0: never
# Programs during which nothing runs, by the name of their process.
# programs = []
# What is never run here: kinds of work (text, embeddings, rerank), models, callers' organisations and countries.
# refuse_kinds = []
# refuse_models = []
# refuse_organisations = []
# refuse_countries = []
# How engines are kept apart from the rest of the machine: auto (the best that this machine can do), bwrap, landlock,
# or none: engines then run with all rights of whoever started them.
# isolation = "auto"
# How fast the machine is with each model is measured when it is first lent, and remembered.
# measure = true

[power]
# What electricity costs here, and what the machine draws. Prices never go below it.
# usd_per_kwh = 0.30
# windows = [{ hours = "22-6", usd_per_kwh = 0.20 }]
# Lend only while power costs no more than this; 0: always.
# usd_per_kwh_max = 0
# Watts beyond idling when all cores work; 0: estimated.
# watts = 0

[engine]
# A server of your own that `fallow lend --engine URL` lends: its key, and what it costs per million tokens.
# key_file = ""
# usd_per_million_prompt = 0
# usd_per_million_output = 0
# cpu or gpu; empty: as this machine.
# hardware = ""
# gpu = ""
# context_tokens = 8192
"""


class Lend(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When this machine may work, and for whom. None: the profile's; `profile` None: the command's."""

    profile: Profile | None = None
    cores: Annotated[int, Meta(ge=0, le=1024)] = 0
    hours: Hours = ""
    others_percent_max: Share | None = None
    resume_after_s: Annotated[float, Meta(ge=0, le=86_400)] | None = None
    input_idle_s: Annotated[float, Meta(ge=0, le=86_400)] | None = None
    while_fullscreen: bool | None = None
    while_metered: bool | None = None
    on_battery: bool | None = None
    battery_percent_min: Share | None = None
    temperature_c_max: Annotated[float, Meta(ge=20, le=120)] | None = None
    memory_free_percent_min: Share | None = None
    disk_free_gb_min: Annotated[float, Meta(ge=0, le=100_000)] | None = None
    upload_gb_per_day: Annotated[float, Meta(ge=0, le=100_000)] = 0.0
    leave_after_s: Annotated[float, Meta(ge=0, le=86_400)] | None = None
    programs: Names = ()
    refuse_kinds: tuple[Kind, ...] = ()
    refuse_models: Names = ()
    refuse_organisations: Names = ()
    refuse_countries: Names = ()
    isolation: Literal["auto", "bwrap", "landlock", "none"] = "auto"
    measure: bool = True


class PowerHours(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A price for a part of the day."""

    hours: Hours
    usd_per_kwh: Usd


class Power(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What electricity costs, and what the machine draws beyond idling."""

    usd_per_kwh: Usd = 0.30
    windows: Annotated[tuple[PowerHours, ...], Meta(max_length=48)] = ()
    usd_per_kwh_max: Usd = 0.0
    watts: Watts = 0.0


class Attached(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A server that the lender brings."""

    key_file: str = ""
    usd_per_million_prompt: Usd = 0.0
    usd_per_million_output: Usd = 0.0
    hardware: Literal["", "cpu", "gpu"] = ""
    gpu: Annotated[str, Meta(pattern=r"^[ -~]{0,64}\Z")] = ""
    context_tokens: Annotated[int, Meta(ge=1, le=10_000_000)] = 8_192
