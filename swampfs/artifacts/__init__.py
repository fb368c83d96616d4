"""The artifact catalog on top of the tree: what ``swampfs query`` and ``swampfs latest`` answer from."""
