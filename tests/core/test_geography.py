"""Where a node can't be: never said of a place where it may be, and said of lies that light gives away."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.core.countries import COUNTRIES, Circle
from fallow.core.geography import (
    LIGHT_KM_PER_MS,
    arc,
    distance_km_least,
    is_known,
    region_in,
    rtt_ms_least,
    why_region_impossible,
)

PROMISE = settings(max_examples=100)
CODES = st.sampled_from(sorted(COUNTRIES))
SURFACE_KM = 6_371.0
"""The earth's mean radius, by which true distances are reckoned here."""
CITIES = {
    "Berlin": ("de", 52.52, 13.40),
    "Hamburg": ("de", 53.55, 9.99),
    "Munich": ("de", 48.14, 11.58),
    "Paris": ("fr", 48.86, 2.35),
    "Ajaccio": ("fr", 41.92, 8.74),
    "Lisbon": ("pt", 38.72, -9.14),
    "Ponta Delgada": ("pt", 37.74, -25.67),
    "Las Palmas": ("es", 28.12, -15.43),
    "Oslo": ("no", 59.91, 10.75),
    "Kirkenes": ("no", 69.73, 30.05),
    "Lerwick": ("gb", 60.15, -1.15),
    "Heraklion": ("gr", 35.34, 25.13),
    "Lampedusa": ("it", 35.50, 12.61),
    "New York": ("us", 40.71, -74.01),
    "San Francisco": ("us", 37.77, -122.42),
    "Key West": ("us", 24.56, -81.78),
    "Honolulu": ("us", 21.31, -157.86),
    "Anchorage": ("us", 61.22, -149.90),
    "Adak": ("us", 51.88, -176.65),
    "St. John's": ("ca", 47.56, -52.71),
    "Alert": ("ca", 82.50, -62.35),
    "Victoria": ("ca", 48.43, -123.37),
    "Tijuana": ("mx", 32.51, -117.04),
    "Cancun": ("mx", 21.16, -86.85),
    "Easter Island": ("cl", -27.15, -109.43),
    "Puerto Williams": ("cl", -54.93, -67.61),
    "Galapagos": ("ec", -0.74, -90.31),
    "Recife": ("br", -8.05, -34.88),
    "Tabatinga": ("br", -4.25, -69.94),
    "Ushuaia": ("ar", -54.80, -68.30),
    "Reykjavik": ("is", 64.15, -21.94),
    "Kaliningrad": ("ru", 54.71, 20.51),
    "Vladivostok": ("ru", 43.12, 131.89),
    "Anadyr": ("ru", 64.73, 177.51),
    "Beijing": ("cn", 39.90, 116.40),
    "Kashgar": ("cn", 39.47, 75.99),
    "Sanya": ("cn", 18.25, 109.50),
    "Tokyo": ("jp", 35.68, 139.69),
    "Naha": ("jp", 26.21, 127.68),
    "Port Blair": ("in", 11.62, 92.73),
    "Jayapura": ("id", -2.54, 140.70),
    "Banda Aceh": ("id", 5.55, 95.32),
    "Perth": ("au", -31.95, 115.86),
    "Hobart": ("au", -42.88, 147.33),
    "Invercargill": ("nz", -46.41, 168.35),
    "Suva": ("fj", -18.14, 178.44),
    "Kiritimati": ("ki", 1.87, -157.43),
    "Cape Town": ("za", -33.92, 18.42),
    "Singapore": ("sg", 1.35, 103.82),
    "Saint-Denis": ("re", -20.88, 55.45),
    "Antananarivo": ("mg", -18.88, 47.51),
}


@st.composite
def places(draw: st.DrawFn, code: str | None = None) -> tuple[str, float, float]:
    """A country and a place in one of its circles, in degrees."""
    code = code or draw(CODES)
    circle: Circle = draw(st.sampled_from(COUNTRIES[code]))
    angle, course = draw(st.floats(0, 1)) * circle.radius_km / SURFACE_KM, draw(st.floats(0, 2 * math.pi))
    phi = math.radians(circle.latitude)
    sine = max(-1.0, min(1.0, math.sin(phi) * math.cos(angle) + math.cos(phi) * math.sin(angle) * math.cos(course)))
    east = math.atan2(math.sin(course) * math.sin(angle) * math.cos(phi), math.cos(angle) - math.sin(phi) * sine)
    return code, math.degrees(math.asin(sine)), circle.longitude + math.degrees(east)


def light_ms(a: tuple[str, float, float], b: tuple[str, float, float]) -> float:
    return 2 * arc(*a[1:], *b[1:]) * SURFACE_KM / LIGHT_KM_PER_MS


@PROMISE
@given(places(), places(), st.floats(1, 1_000))
def test_what_is_possible_is_never_refused(node: tuple[str, float, float], gateway: tuple[str, float, float], slowness: float) -> None:
    seen = [(region_in(gateway[0]), light_ms(node, gateway) * slowness)]
    assert why_region_impossible(f"xx-{node[0]}", seen) is None
    assert why_region_impossible(f"xx-{node[0]}-somewhere", seen) is None


@pytest.mark.parametrize("gateway", CITIES)
def test_no_city_is_refused_from_another(gateway: str) -> None:
    here = CITIES[gateway]
    for there in CITIES.values():
        assert why_region_impossible(f"xx-{there[0]}", [(region_in(here[0]), light_ms(here, there))]) is None


@pytest.mark.parametrize("name", CITIES)
def test_every_city_lies_in_its_country(name: str) -> None:
    code, *place = CITIES[name]
    assert any(arc(circle.latitude, circle.longitude, *place) * SURFACE_KM < circle.radius_km for circle in COUNTRIES[code])


@PROMISE
@given(CODES, CODES)
def test_distances_are_the_same_both_ways(a: str, b: str) -> None:
    there, back = distance_km_least(f"x-{a}", f"x-{b}"), distance_km_least(f"x-{b}", f"x-{a}")
    assert math.isclose(there, back, abs_tol=1e-6)
    assert 0 <= there <= math.pi * SURFACE_KM


@pytest.mark.parametrize("code", COUNTRIES)
def test_a_country_is_no_way_from_itself(code: str) -> None:
    assert distance_km_least(f"x-{code}", f"x-{code}-y") == 0
    assert why_region_impossible(f"x-{code}", [(region_in(code), 0.0)]) is None


@pytest.mark.parametrize(("a", "b", "at_least_km", "at_most_km"), [
    ("eu-de", "na-us", 3_500, 6_100),
    ("eu-de", "as-jp", 7_000, 8_400),
    ("eu-gb", "oc-au", 9_000, 14_000),
    ("eu-de", "eu-fr", 0, 0),
    ("eu-de", "eu-at", 0, 0),
    ("na-us", "eu-ru", 0, 0),  # the Bering Strait
    ("sa-br", "af-sn", 1_000, 2_900),
    ("oc-nz", "eu-es", 15_000, 19_500),
])  # fmt: skip
def test_some_distances(a: str, b: str, at_least_km: float, at_most_km: float) -> None:
    assert at_least_km <= distance_km_least(a, b) <= at_most_km


@pytest.mark.parametrize(("claimed", "here", "rtt_ms", "impossible"), [
    ("oc-au", "de", 5.0, True),
    ("na-us", "de", 1.0, True),
    ("na-us-ny", "de", 20.0, True),
    ("NA-US", "de", 20.0, True),
    ("na-us", "de", 85.0, False),
    ("eu-de", "us", 2.0, True),
    ("eu-de", "de", 0.1, False),
    ("eu-de", "fr", 0.1, False),
    ("eu-de", "au", 5_000.0, False),  # slow proves nothing
    ("unknown", "de", 0.1, False),
    ("here", "de", 0.1, False),
    ("us", "de", 0.1, False),  # as `country_of` reads it, this names no country: it could be a continent
    ("xx-qq", "de", 0.1, False),
    ("oc-au", "unknown", 0.1, False),
    ("oc-au", "qq", 0.1, False),
    ("", "", 0.0, False),
])  # fmt: skip
def test_claims(claimed: str, here: str, rtt_ms: float, impossible: bool) -> None:
    why = why_region_impossible(claimed, [(region_in(here), rtt_ms)])
    assert (why is not None) is impossible
    assert why is None or (claimed in why and f"{rtt_ms:.1f} ms" in why)


def test_one_of_several_gateways_is_enough() -> None:
    assert why_region_impossible("na-us", [("x-us", 200.0), ("x-jp", 150.0), ("x-de", 3.0)]) is not None
    assert why_region_impossible("na-us", []) is None


def test_light_takes_a_third_of_a_second_for_a_hundred_thousand_kilometres() -> None:
    assert rtt_ms_least(50_000) == pytest.approx(333.56, abs=0.01)
    assert rtt_ms_least(0) == 0


def test_a_region_is_known_if_its_country_is() -> None:
    assert is_known("eu-de")
    assert is_known(region_in("de"))
    assert not any(map(is_known, ("unknown", "", "de", region_in("unknown"), region_in("qq"))))


@pytest.mark.parametrize("code", COUNTRIES)
def test_the_table_holds_codes_and_places_on_earth(code: str) -> None:
    assert len(code) == 2
    assert code.islower()
    for circle in COUNTRIES[code]:
        assert -90 <= circle.latitude <= 90
        assert -180 <= circle.longitude <= 180
        assert 10 <= circle.radius_km <= 3_000


def test_the_table_is_nearly_all_of_the_world() -> None:
    assert len(COUNTRIES) >= 240
