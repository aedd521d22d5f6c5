"""One type per kind of id, so that a node's id can't be passed where a call's is meant."""

from typing import NewType

OrgId = NewType("OrgId", str)
"""An organisation: owns keys, gateways and nodes."""
NodeId = NewType("NodeId", str)
"""One lender's machine on the network."""
GatewayId = NewType("GatewayId", str)
"""One gateway process."""
KeyId = NewType("KeyId", str)
"""An API key's public name; never the key."""
CallId = NewType("CallId", str)
"""One HTTP request of a caller."""
AttemptId = NewType("AttemptId", str)
"""One try of a call on one node; unguessable, since answers are told apart by it."""
TabId = NewType("TabId", str)
"""Money held at the hub from which a gateway pays without waiting for the ledger."""
