"""One batch over several ranks: who owns which row, and the exchange of rows between owners and borrowers."""
