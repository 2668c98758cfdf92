"""What is read of a network: taps and their table, connectors, and which positions and regions count."""
