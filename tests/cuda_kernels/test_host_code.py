"""C++ compiled and run on the host: masks, factors, launches, refusals, and what the emulator notices."""

from host_program import built, cuda_headers, run


def test_every_score_is_kept_as_floats_compare():
    run("test_keep.cpp")


def test_the_emulator_notices_a_write_into_what_is_being_read():
    run("test_reads.cpp", [built("machine.cpp")])


def test_factors_of_d_scores_are_the_reference_s():
    run("test_score_factor.cpp")


def test_a_launch_keeps_its_shared_memory_while_another_thread_launches():
    run("test_launch.cpp", [], cuda_headers())


def test_the_hopper_kernel_of_d_scores_names_what_it_leaves_to_others():
    run("test_refusal.cpp", [built("score_grad_sm90.cpp")])
