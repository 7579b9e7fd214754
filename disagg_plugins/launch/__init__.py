"""Starting the workers that a policy describes."""
