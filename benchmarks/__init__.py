"""What the kernels cost, one file a question: `make bench` answers all of them, about two minutes on two cores."""
