"""What the kernels cost, one file a question: `make bench` answers all of them, about four minutes on two cores."""
