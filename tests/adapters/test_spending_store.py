"""What API keys have cost, on SQLite and on a real PostgreSQL: sums that no repetition, order or thread can change."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from fallow.adapters.sql.database import open_database
from fallow.adapters.sql.migrate import migrate
from fallow.adapters.sql.registry import SqlRegistry, open_registry
from fallow.model.errors import StoreFailed
from fallow.model.identity import ApiKey, Organisation
from fallow.model.ids import GatewayId, KeyId, OrgId
from fallow.model.messages import SPENT_KEYS_MAX, SPENT_MICRO_MAX

pytest_plugins = ("databases",)
NOW = 1_800_000_000_000
HERE, THERE = GatewayId("gw-1"), GatewayId("gw-2")
ONE, TWO, LATE = KeyId("key-1"), KeyId("key-2"), KeyId("key-late")


def key_of(id: str) -> ApiKey:
    return ApiKey(id=KeyId(id), digest=id.encode() * 8, org_id=OrgId("acme"), created_at_ms=NOW)


@pytest.fixture
def registry(database_url: str) -> Iterator[SqlRegistry]:
    opened = open_registry(database_url)
    opened.organisations.add(Organisation(id=OrgId("acme")))
    for id in (ONE, TWO):
        opened.keys.add(key_of(id))
    yield opened
    opened.close()


def test_what_a_gateway_says_is_the_sum_since_its_process_began(registry: SqlRegistry) -> None:
    tell, totals = registry.spending.tell, registry.spending.totals
    assert totals() == {}
    assert totals([ONE]) == {ONE: 0}
    assert tell(HERE, NOW, {ONE: 5}) == {ONE: 5}
    assert tell(HERE, NOW, {ONE: 5, TWO: 0}) == {ONE: 5, TWO: 0}, "again, and another that has cost nothing yet"
    assert tell(HERE, NOW, {ONE: 8}) == {ONE: 8}
    assert tell(HERE, NOW, {ONE: 6}) == {ONE: 8}, "an older report that came late"
    assert tell(THERE, NOW, {ONE: 3, TWO: 1}) == {ONE: 11, TWO: 1}
    assert tell(HERE, NOW + 1, {ONE: 2}) == {ONE: 13}, "the process that follows"
    assert tell(HERE, NOW, {}) == {}
    assert totals() == {ONE: 13, TWO: 1}
    assert totals([TWO, KeyId("nobody")]) == {TWO: 1, KeyId("nobody"): 0}


def test_keys_that_are_not_there_are_left_out(registry: SqlRegistry) -> None:
    assert registry.spending.tell(HERE, NOW, {LATE: 5, ONE: 1}) == {ONE: 1}
    registry.keys.add(key_of(LATE))
    assert registry.spending.totals() == {ONE: 1}
    assert registry.spending.tell(HERE, NOW, {LATE: 5}) == {LATE: 5}


def test_large_reports_of_large_amounts(registry: SqlRegistry) -> None:
    keys = [KeyId(f"many-{number}") for number in range(SPENT_KEYS_MAX // 8)]
    for id in keys:
        registry.keys.add(key_of(id))
    report = dict.fromkeys(keys, SPENT_MICRO_MAX)
    assert registry.spending.tell(HERE, NOW, report) == report
    assert set(registry.spending.tell(THERE, NOW, report).values()) == {2 * SPENT_MICRO_MAX}


def test_less_than_nothing_is_refused(registry: SqlRegistry, database_url: str) -> None:
    registry.spending.tell(HERE, NOW, {ONE: 5})
    database = open_database(database_url)
    with pytest.raises(StoreFailed), database.writing() as connection:
        connection.exec_driver_sql("UPDATE spending SET micro = -1")
    database.close()
    assert registry.spending.totals() == {ONE: 5}


@pytest.mark.parametrize("seed", range(4))
def test_any_order_and_any_repetition_come_to_the_same(registry: SqlRegistry, seed: int) -> None:
    chance = random.Random(seed)
    sums: dict[tuple[GatewayId, int], dict[KeyId, int]] = {}
    reports = []
    for _ in range(12):
        process = (chance.choice((HERE, THERE)), NOW + chance.randrange(2))
        said = sums.setdefault(process, {})
        for id in chance.sample((ONE, TWO), chance.randint(1, 2)):
            said[id] = said.get(id, 0) + chance.randrange(100)
        reports.append((*process, dict(said)))
    expected = {id: sum(said.get(id, 0) for said in sums.values()) for id in (ONE, TWO)}
    more = reports + chance.choices(reports, k=12)
    chance.shuffle(more)
    seen = dict.fromkeys((ONE, TWO), 0)
    for report in more:
        for id, micro in registry.spending.tell(*report).items():
            assert seen[id] <= micro, "an answer never goes down"
            seen[id] = micro
    assert registry.spending.totals([ONE, TWO]) == expected == seen


def test_many_threads_and_two_hubs(registry: SqlRegistry, database_url: str) -> None:
    other = open_registry(database_url)

    def tell(number: int) -> None:
        hub = (registry, other)[number % 2]
        hub.spending.tell(GatewayId(f"gw-{number % 4}"), NOW, {TWO: number, ONE: 2 * number})

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(tell, [*range(24)] * 2))
    other.close()
    assert registry.spending.totals() == {ONE: 2 * (20 + 21 + 22 + 23), TWO: 20 + 21 + 22 + 23}


def test_keys_of_the_first_schema_have_cost_nothing(database_url: str) -> None:
    database = open_database(database_url)
    migrate(database, to="0001")
    with database.writing() as connection:
        connection.exec_driver_sql("INSERT INTO organisation (id, public_key, created_at_ms) VALUES ('acme', '', 1)")
        connection.exec_driver_sql(
            "INSERT INTO api_key (id, digest, digest_head, org_id, name, role, policy, allowance, models, budget_micro, created_at_ms) "
            "VALUES ('key-1', 'd', 'd', 'acme', '', 'caller', '{}', '{}', '[]', 7, 1)"
        )
    database.close()
    registry = open_registry(database_url)
    assert registry.keys.named(ONE).budget_micro == 7
    assert registry.spending.totals([ONE]) == {ONE: 0}
    assert registry.spending.tell(HERE, NOW, {ONE: 4}) == {ONE: 4}
    registry.close()
