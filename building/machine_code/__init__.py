"""Read the output of assemblers: instructions, loops, and the symptoms of one assembler bug."""
