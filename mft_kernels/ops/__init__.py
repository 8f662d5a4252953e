"""The ops: public functions that check their arguments, schemas, autograd, and the way to a backend."""
