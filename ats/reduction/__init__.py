"""How a block loses tokens."""
