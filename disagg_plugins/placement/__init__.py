"""Which hardware each role gets: the types that the placement hooks speak."""
