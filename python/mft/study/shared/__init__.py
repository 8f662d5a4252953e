"""A study that several processes work on, on one machine or many: who does what, and where it was done."""
