"""How the ranks of a group find each other, come together again, split, shrink, grow, and leave."""
