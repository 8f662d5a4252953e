"""The ops: public functions that check their arguments, schemas, autograd, and the choice of a backend."""
