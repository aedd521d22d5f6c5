"""What physics says of a region that a node claims: nothing is answered sooner than light could travel there and back.

That an answer came late says nothing: lines are long, and machines are busy. Only too early an answer proves something. It follows that
a node which lies about its region can be caught by a gateway that is nearer to it than it says, and by no other.
"""

import functools
import math
from collections.abc import Sequence

from fallow.core.countries import COUNTRIES, Circle
from fallow.core.needs import country_of

LIGHT_KM_PER_MS = 299.792458
"""In vacuum. Glass has two thirds of that, so no line beats this."""
EARTH_KM = 6_335.0
"""The least radius of curvature of the WGS 84 ellipsoid (at the equator, northwards): arcs reckoned with it are never too long."""
PAIRS_MAX = 4_096
"""Pairs of regions whose distance is remembered."""


def region_in(country: str) -> str:
    """A region that says no more than a country's code, as `country_of` reads it."""
    return f"any-{country}"


def is_known(region: str) -> bool:
    """Whether it can be told roughly where a region lies."""
    return country_of(region) in COUNTRIES


@functools.lru_cache(maxsize=PAIRS_MAX)
def distance_km_least(region_a: str, region_b: str) -> float:
    """How far places in the two regions are apart at least, over the ground, in km; 0 if where either lies isn't known."""
    circles_a, circles_b = COUNTRIES.get(country_of(region_a) or ""), COUNTRIES.get(country_of(region_b) or "")
    if circles_a is None or circles_b is None:
        return 0.0
    return max(0.0, min(_gap_km(a, b) for a in circles_a for b in circles_b))


def rtt_ms_least(km: float) -> float:
    """The time in which a message can go so far and its answer come back, in milliseconds."""
    return 2 * km / LIGHT_KM_PER_MS


def why_region_impossible(claimed: str, seen: Sequence[tuple[str, float]]) -> str | None:
    """Why a node can't be in the region that it claims, by round trips in milliseconds from regions; None if it can.

    The round trips must not be shorter than they were: what is unsure about them has to be added before.
    """
    for region, rtt_ms in seen:
        km = distance_km_least(claimed, region)
        least_ms = rtt_ms_least(km)
        if rtt_ms < least_ms:
            where = f"{claimed} is {km:.0f} km or more from {region}, which takes light {least_ms:.1f} ms there and back"
            return f"{where}, and it answered in {rtt_ms:.1f} ms"
    return None


def _gap_km(a: Circle, b: Circle) -> float:
    """Between the circles' edges; below 0 where they overlap."""
    return arc(a.latitude, a.longitude, b.latitude, b.longitude) * EARTH_KM - a.radius_km - b.radius_km


def arc(latitude_a: float, longitude_a: float, latitude_b: float, longitude_b: float) -> float:
    """The angle between two places given in degrees, seen from the earth's centre, in radians (haversine formula)."""
    phi_a, phi_b = math.radians(latitude_a), math.radians(latitude_b)
    across = math.sin(math.radians(longitude_b - longitude_a) / 2) ** 2
    return 2 * math.asin(math.sqrt(min(1.0, math.sin((phi_b - phi_a) / 2) ** 2 + math.cos(phi_a) * math.cos(phi_b) * across)))
