"""State in SQL: one schema, on SQLite or PostgreSQL. Only hubs import this; nodes and gateways start without it."""
