"""An experiment: one teacher, and students ("arms") that differ in a few fields of one recipe."""
