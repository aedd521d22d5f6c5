"""The node: one lender's machine on the network."""
