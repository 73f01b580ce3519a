"""How the ranks of a group find each other, come together again, and leave."""
