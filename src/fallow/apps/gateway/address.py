"""Where a running gateway writes its address, for the commands on the same machine."""

ADDRESS_FILE = "gateway.json"
