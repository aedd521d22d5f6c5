"""The owner's part of the settings: what they lend, when, and to whom; and what power costs them."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fallow.model.needs import Ring
from fallow.model.owner import Profile

Share = Annotated[float, Meta(ge=0, le=100)]
Hours = Annotated[str, Meta(max_length=200)]
Names = Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=200)], ...], Meta(max_length=256)]
Usd = Annotated[float, Meta(ge=0, le=1_000)]
Watts = Annotated[float, Meta(ge=0, le=100_000)]
AsProfile = Literal["profile"]
Kind = Literal["text", "embeddings", "rerank"]

TEMPLATE = """\
[lend]
# When this machine may work for others. A change takes effect at once; `fallow lend status` shows it.
# invisible: stops as soon as somebody uses the machine; balanced: keeps some cores; dedicated: works always;
# night: invisible, from 22 to 7; quiet: half of the cores, and cool.
# default: invisible for `fallow lend`, dedicated for `fallow up`, where the machine works for yourself.
# profile = "default"
# The most cores that engines use; 0: what the profile says.
# cores = 0
# Local time, such as "22-7" or "12:30-14, 20-8"; empty: what the profile says.
# hours = ""
# The following are as the profile has them, unless they are set.
# What others may use of all cores before we stop, in percent, and how long it must be quiet before we go on.
# others_percent_max = "profile"
# resume_after_s = "profile"
# How long nobody has touched keyboard or mouse; 0: doesn't matter.
# input_idle_s = "profile"
# true or false.
# while_fullscreen = "profile"
# while_metered = "profile"
# on_battery = "profile"
# How full the battery must be, also while it charges.
# battery_percent_min = "profile"
# 0: don't look at the temperature.
# temperature_c_max = "profile"
# memory_free_percent_min = "profile"
# disk_free_gb_min = "profile"
# After a pause of this length memory is freed too; 0: never.
# leave_after_s = "profile"
# 0: no limit.
# upload_gb_per_day = 0
# Programs during which nothing runs, by the name of their process.
# programs = []
# What is never run here: kinds of work (text, embeddings, rerank), models, callers' organisations and countries.
# refuse_kinds = []
# refuse_models = []
# refuse_organisations = []
# refuse_countries = []
# Who may use this machine: own (your organisation), partner, market (anyone).
# serves = ["own", "partner"]
# What is asked for: follow (the network's price index), floor (what the electricity costs), or fixed (the two prices
# below, in USD per million tokens). It is never below what the electricity costs.
# price = "follow"
# usd_per_million_prompt = 0
# usd_per_million_output = 0
# Whether models are loaded and dropped as callers want them, among those that this machine offers.
# follow_demand = true
# How engines are kept apart from the rest of the machine: auto (the best that this machine can do), bwrap, landlock,
# or none: engines then run with all rights of whoever started them.
# isolation = "auto"
# How fast the machine is with each model is measured when it is first lent, and remembered.
# measure = true

[power]
# What electricity costs here, and what the machine draws. Prices never go below it.
# usd_per_kwh = 0.30
# Other prices at some hours, such as [{ hours = "22-6", usd_per_kwh = 0.20 }].
# windows = []
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
    """When this machine may work, and for whom. "profile": as the profile has it; profile "default": the command's."""

    profile: Profile | Literal["default"] = "default"
    cores: Annotated[int, Meta(ge=0, le=1024)] = 0
    hours: Hours = ""
    others_percent_max: Share | AsProfile = "profile"
    resume_after_s: Annotated[float, Meta(ge=0, le=86_400)] | AsProfile = "profile"
    input_idle_s: Annotated[float, Meta(ge=0, le=86_400)] | AsProfile = "profile"
    while_fullscreen: bool | AsProfile = "profile"
    while_metered: bool | AsProfile = "profile"
    on_battery: bool | AsProfile = "profile"
    battery_percent_min: Share | AsProfile = "profile"
    temperature_c_max: Annotated[float, Meta(ge=0, le=120)] | AsProfile = "profile"
    memory_free_percent_min: Share | AsProfile = "profile"
    disk_free_gb_min: Annotated[float, Meta(ge=0, le=100_000)] | AsProfile = "profile"
    upload_gb_per_day: Annotated[float, Meta(ge=0, le=100_000)] = 0.0
    leave_after_s: Annotated[float, Meta(ge=0, le=86_400)] | AsProfile = "profile"
    programs: Names = ()
    refuse_kinds: tuple[Kind, ...] = ()
    refuse_models: Names = ()
    refuse_organisations: Names = ()
    refuse_countries: Names = ()
    serves: Annotated[tuple[Ring, ...], Meta(min_length=1, max_length=3)] = ("own", "partner")
    price: Literal["follow", "floor", "fixed"] = "follow"
    usd_per_million_prompt: Usd = 0.0
    usd_per_million_output: Usd = 0.0
    follow_demand: bool = True
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
