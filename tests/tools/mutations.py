"""A mistake for each promise of the design's sections on reliability and evaluation, and the test that must find it.

`python -m pytest -m slow tests/tools` makes each mistake in a copy of the tree and runs the test there. A new promise
gets a line here; when the code changes so that a line does not fit any more, a test of the default tier says which.
"""

import typing


class Mutation(typing.NamedTuple):
    promise: str
    file: str
    old: str  # stands once in the file
    new: str
    test: str  # of the default tier, which then fails


RELIABILITY, UNIT, BUNDLES = ("tests/{}/test_".format(name) for name in ("reliability", "unit", "bundles"))
MUTATIONS = [
    # Reliability
    Mutation(
        "a checkpoint is on the disk before it gets its name",
        "common/errors.py",
        "os.fsync(file.fileno())",
        "pass",
        RELIABILITY + "bad_files.py::test_a_file_is_on_the_disk_before_it_takes_the_name_of_another",
    ),
    Mutation(
        "a checkpoint takes its name at once, when it is whole",
        "common/errors.py",
        "os.replace(name, path)",
        'open(path, "wb").write(open(name, "rb").read())',
        RELIABILITY + "bad_files.py::test_a_file_is_on_the_disk_before_it_takes_the_name_of_another",
    ),
    Mutation(
        "a damaged checkpoint is found, and an older one taken",
        "common/weights.py",
        "damaged = any(entry.CRC for entry in entries) and archive.testzip()",
        "damaged = None",
        RELIABILITY + "resume.py::test_auto_falls_back_and_says_so[flipped]",
    ),
    Mutation(
        "a resumed run ends with the same bits",
        "common/checkpoint.py",
        "part.load_state_dict(_with_options_of(part, content[name]))",
        'name == "optimizer" or part.load_state_dict(content[name])',
        RELIABILITY + "resume.py::test_sigterm_in_the_middle_of_an_epoch[MnasNet]",
    ),
    Mutation(
        "a run goes on with another number of ranks, each image seen once",
        "common/data.py",
        "epoch_order(len(self), self._seed, epoch, self._repeats)",
        "epoch_order(len(self), self._seed + self._world, epoch, self._repeats)",
        RELIABILITY + "resume_ranks.py::test_each_image_once[worlds0]",
    ),
    Mutation(
        "SIGTERM ends a run of one rank with a checkpoint",
        "common/logger.py",
        "return self._stop_signal",
        "return 0 if is_alone else self._stop_signal",
        UNIT + "logger.py::test_one_rank_learns_of_a_signal_at_once_and_logs_the_steps_before_it",
    ),
    Mutation(
        "SIGTERM ends a run of several ranks with a checkpoint",
        "common/logger.py",
        "return self._stop_signal",
        "return self._stop_signal if is_alone else 0",
        UNIT + "logger.py::test_all_ranks_learn_of_a_signal_within_two_seconds_in_the_same_step",
    ),
    Mutation(
        "SIGINT saves too",
        "common/distributed.py",
        "(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)",
        "(signal.SIGTERM, signal.SIGHUP)",
        RELIABILITY + "signals.py::test_the_scripts_pass_signals_on[1-INT]",
    ),
    Mutation(
        "no process is left when the launcher is killed",
        "common/distributed.py",
        "prctl(pr_set_pdeathsig, signal.SIGKILL)",
        "prctl(pr_set_pdeathsig, 0)",
        RELIABILITY + "signals.py::test_a_killed_script_leaves_no_process",
    ),
    Mutation(
        "nor when it has been killed before a process asks the kernel for that",
        "common/distributed.py",
        "if parent and parent != str",
        "if False and parent != str",
        RELIABILITY + "signals.py::test_a_script_that_is_killed_at_once_leaves_no_process",
    ),
    Mutation(
        "SIGKILL loses no more than --save-steps",
        "common/checkpoint.py",
        "if self._log.is_save_point:",
        "if self._log.is_save_point and self.samples < 0:",
        RELIABILITY + "bad_files.py::test_save_steps_saves_within_an_epoch",
    ),
    Mutation(
        "SIGKILL takes no loss from the file of losses",
        "common/logger.py",
        "is_log_point = is_log_point or self.is_save_point",
        "is_log_point = is_log_point or self._step < 0",
        RELIABILITY + "resume.py::test_the_losses_before_a_checkpoint_survive_a_kill",
    ),
    Mutation(
        "damaged images are replaced within a budget",
        "common/data.py",
        "if self.training and len(self.bad) > self._allowed:",
        "if self.training and len(self.bad) > 10 + self._allowed:",
        RELIABILITY + "bad_images.py::test_the_budget",
    ),
    Mutation(
        "damaged images are named",
        "common/logger.py",
        "for text in loader.share_bad() if new_bad else ():",
        "for text in ():",
        UNIT + "logger.py::test_bad_images_of_a_single_rank_are_named_in_the_same_step",
    ),
    Mutation(
        "damaged images are never replaced in val/",
        "common/data.py",
        "share = args.max_bad_images if training else 0",
        "share = args.max_bad_images",
        RELIABILITY + "bad_images.py::test_names_cannot_write_into_the_log",
    ),
    Mutation(
        "a loss that is not finite stops the run",
        "common/logger.py",
        'if not math.isfinite(self._since_log["loss"]):',
        "if False:",
        RELIABILITY + "bad_numbers.py::test_a_loss_that_is_not_finite",
    ),
    Mutation(
        "weights that are not finite do not replace the last good checkpoint",
        "common/checkpoint.py",
        "if not all(torch.isfinite(t).all() for t in",
        "if not all(True for t in",
        RELIABILITY + "bad_numbers.py::test_weights_that_are_not_finite_are_not_saved",
    ),
    Mutation(
        "a full disk is one line",
        "common/checkpoint.py",
        'if self._args.on_save_error == "stop":',
        "if False:",
        RELIABILITY + "bad_files.py::test_a_file_size_limit[stop]",
    ),
    Mutation(
        "a folder that cannot be written is one line",
        "common/checkpoint.py",
        'raise UserError("checkpoints cannot be written to {}: {}".format(self._folder, error.strerror)) from None',
        "raise",
        RELIABILITY + "bad_files.py::test_a_folder_that_cannot_be_made_is_one_line",
    ),
    Mutation(
        "too little memory is one line before the first batch",
        "common/transforms.py",
        "if loaders * least * size > free:",
        "if False:",
        UNIT + "data.py::test_too_little_memory_is_refused",
    ),
    Mutation(
        "a device that is not there is one line",
        "common/device.py",
        'raise UserError("--device npu: {}".format(problem))',
        'return "cpu"',
        BUNDLES + "scripts.py::test_a_wrong_option_is_refused_once_and_before_anything_happens[--device=npu]",
    ),
    Mutation(
        "another torch_npu is one line before torch is imported",
        "common/__init__.py",
        "if npu != torch:",
        "if False:",
        "tests/npu/test_errors.py::test_what_would_break_the_import_of_torch_is_found_before",
    ),
    Mutation(
        "files that carry code are refused",
        "common/weights.py",
        'map_location="cpu", weights_only=True)',
        'map_location="cpu", weights_only=False)',
        RELIABILITY + "safe_loading.py::test_no_file_runs_its_code",
    ),
    # Evaluation
    Mutation(
        "each rank counts every world_size-th image, none twice",
        "common/data.py",
        "positions[self._ranks.rank :: self._world] for positions in places",
        "positions[0 :: self._world] for positions in places",
        UNIT + "data.py::test_evaluation_counts_every_image_once_and_pads",
    ),
    Mutation(
        "padding is not counted",
        "common/logger.py",
        "targets >= 0",
        "targets >= -9",
        UNIT + "logger.py::test_correct_counts",
    ),
    Mutation(
        "the last batch is not left out",
        "common/data.py",
        "(rest > 0 if not self.training else rest >= 2 * self._world)",
        "(rest >= 2 * self._world)",
        UNIT + "data.py::test_evaluation_keeps_a_last_batch_however_small",
    ),
    Mutation(
        "a signal that has ended another rank ends an evaluation as one of its own does",
        "common/logger.py",
        "counts = self._ranks.sum(counts)\n        except Stopped",
        "counts = self._ranks.sum(counts)\n        except KeyError",
        UNIT + "logger.py::test_a_signal_that_another_rank_has_followed_ends_an_evaluation",
    ),
    Mutation(
        "the ranks' counts are added up",
        "common/logger.py",
        "self._ranks.sum(counts)",
        "counts",
        BUNDLES + "runs.py::test_one_rank_measures_the_digits_that_two_have_measured[MnasNet]",
    ),
    Mutation(
        "that every image was counted is asserted",
        "common/logger.py",
        "assert seen + unreadable == len(loader),",
        "assert True,",
        UNIT + "logger.py::test_an_evaluation_counts_every_image_once_and_the_best_is_kept",
    ),
    Mutation(
        "an image that cannot be read counts as wrong",
        "common/logger.py",
        "acc1, acc5 = 100 * correct1 / len(loader), 100 * correct5 / len(loader)",
        "acc1, acc5 = 100 * correct1 / seen, 100 * correct5 / seen",
        UNIT + "logger.py::test_an_evaluation_counts_every_image_once_and_the_best_is_kept",
    ),
    Mutation(
        "the classes of val/ are those of train/",
        "common/data.py",
        'find_classes(root, "train" if has_split(root, "train") else split)',
        "find_classes(root, split)",
        UNIT + "data.py::test_the_classes_of_val_are_those_of_train",
    ),
    Mutation(
        "one and several ranks measure the same network",
        "common/distributed.py",
        "if gathered:",
        "if False:",
        RELIABILITY + "buffers.py::test_the_mean_of_the_ranks_is_what_each_of_them_gets",
    ),
]
