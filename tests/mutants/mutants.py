"""Defects made by hand: each breaks one promise in one place, and names quick tests that must notice it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MUTANTS", "Mutant"]

MACHINE = "tests/properties/test_state_machine.py"
NODES = "tests/properties/test_simulated_nodes.py"
ONCE = "tests/properties/test_exactly_once.py"
PROMISES = "tests/properties/test_promises.py"
IN_PLACE = "tests/faults/test_in_place.py"
LANES = "tests/distributed/test_lanes.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """*old*, which stands exactly once in the file *path*, becomes *new*."""

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    """Files or node ids; one of them must fail."""


MUTANTS = (
    Mutant(
        name="the record goes up before its parts",
        path="sm_tiered/sending.py",
        old="        self._send_file_list(entry, tier)\n        sent = 0\n",
        new="        put_once(tier, key, data)\n        sent = 0\n",
        tests=(f"{PROMISES}::test_a_record_never_stands_where_its_part_does_not",),
    ),
    Mutant(
        name="the manifest is written before all records are there",
        path="sm_tiered/commit.py",
        old="if set(records) != set(range(world)) or isinstance(tier, ShareTier):",
        new="if False:",
        tests=("tests/unit/test_commit_and_retention.py",),
    ),
    Mutant(
        name="the memory record is written before the copy",
        path="sm_tiered/stager.py",
        old='        crashpoint("stage.before_copy")\n',
        new='        crashpoint("stage.before_copy")\n        self.put_record(record)\n',
        tests=(f"{NODES}::test_a_slow_rank_that_dies_while_others_go_on_takes_nothing_acknowledged_with_it",),
    ),
    Mutant(
        name="acknowledged as soon as this rank has written its record",
        path="sm_tiered/acks.py",
        old="self._group.add(layout.ack_counter(checkpoint), 1)",
        new="self._group.add(layout.ack_counter(checkpoint), self._group.world)",
        tests=(f"{PROMISES}::test_a_checkpoint_without_the_record_of_one_rank_is_none",),
    ),
    Mutant(
        name="the state is read again after save has returned",
        path="sm_tiered/stager.py",
        old="        parts = tuple(\n",
        new="        for part, buffer in staged.buffers:\n            part.write(buffer, {})\n        parts = tuple(\n",
        tests=(f"{PROMISES}::test_what_is_saved_is_the_state_when_save_returned",),
    ),
    Mutant(
        name="digests of what is in memory are not looked at",
        path="sm_tiered/sources.py",
        old="            self._file.pread_into(index * CHUNK_BYTES, view)\n",
        new="            self._file.pread_into(index * CHUNK_BYTES, view)\n            continue\n",
        tests=(f"{PROMISES}::test_a_flipped_bit_in_memory_is_found_and_the_durable_copy_is_used",),
    ),
    Mutant(
        name="digests of what is fetched are not looked at",
        path="sm_tiered/sources.py",
        old="    def _settle(self, index: int) -> None:\n",
        new="    def _settle(self, index: int) -> None:\n        return\n",
        tests=(f"{PROMISES}::test_a_flipped_bit_on_the_durable_tier_is_found_and_the_step_before_is_used",),
    ),
    Mutant(
        name="digests of what is read in place are not looked at",
        path="sm_tiered/sources.py",
        old="        self._held = None\n        self._source.read_into(self._key, index * CHUNK_BYTES, view)\n",
        new="        self._source.read_into(self._key, index * CHUNK_BYTES, view)\n        return view\n",
        tests=(f"{IN_PLACE}::test_a_flipped_bit_in_any_chunk_is_found_and_the_step_before_is_used",),
    ),
    Mutant(
        name="digests of what is promoted are not looked at",
        path="sm_tiered/sending.py",
        old="return checksum.verified(read(), part.chunks, layout.in_dir(entry.checkpoint, part.name))",
        new="return read()",
        tests=(f"{PROMISES}::test_what_was_damaged_in_memory_is_not_promoted",),
    ),
    Mutant(
        name="each rank decides for itself what it restores",
        path="sm_tiered/voted_load.py",
        old="votes = state.group.gather(error_to_json(error) if error is not None else None)",
        new="votes = [error_to_json(error) if error is not None else None]",
        tests=(f"{PROMISES}::test_when_one_rank_can_t_have_its_part_all_take_the_step_before",),
    ),
    Mutant(
        name="each rank decides for itself whether the drain is busy",
        path="sm_tiered/agreement.py",
        old="busy=self._busy(agreed),",
        new="busy=frozenset(self._promotions.look().counts),",
        tests=(f"{NODES}::test_one_slow_node_holds_up_the_choice_on_all",),
    ),
    Mutant(
        name="what fails in one lane makes the others seem free",
        path="sm_tiered/agreement.py",
        old="return frozenset(tier.name for tier in settings.durable if tier.lane in lanes)",
        new="return frozenset(t.name for t in settings.durable if t.lane in lanes and not any(agreed.drain_failed))",
        tests=(LANES,),
    ),
    Mutant(
        name="the cluster's memory waits for storage",
        path="sm_tiered/settings.py",
        old="        return 1\n",
        new="        return 0\n",
        tests=(LANES,),
    ),
    Mutant(
        name="one thread drains all lanes",
        path="sm_tiered/drainer.py",
        old="_MOST_LANES = 16",
        new="_MOST_LANES = 1",
        tests=(LANES,),
    ),
    Mutant(
        name="two lanes share the generation that one holds",
        path="sm_tiered/settings.py",
        old="max(1, len({tier.lane for tier in self.durable}))",
        new="1",
        tests=(LANES,),
    ),
    Mutant(
        name="a promotion that failed elsewhere stays in flight",
        path="sm_tiered/agreement.py",
        old="            if failed:\n",
        new="            if False:\n",
        tests=(
            f"{NODES}::test_a_promotion_that_failed_on_one_node_ends_for_all_and_the_next_save_is_promoted",
            f"{NODES}::test_a_promotion_that_was_not_whole_in_time_ends_for_all",
        ),
    ),
    Mutant(
        name="412 is always success",
        path="sm_tiered/commit.py",
        old="        if standing == data:\n",
        new="        if True:\n",
        tests=("tests/unit/test_commit_and_retention.py",),
    ),
    Mutant(
        name="put_if_absent is not exclusive",
        path="sm_tiered/tiers/files.py",
        old="self._write(key, data, exclusive=True)",
        new="self._write(key, data, exclusive=False)",
        tests=(f"{ONCE}::test_of_processes_that_put_if_absent_exactly_one_is_first",),
    ),
    Mutant(
        name="nobody takes over from the coordinator",
        path="sm_tiered/drain.py",
        old="return now - promotion.complete_since > TAKEOVER_SECS",
        new="return False",
        tests=(f"{NODES}::test_another_node_commits_when_the_coordinator_s_is_lost_after_its_upload",),
    ),
    Mutant(
        name="`if step` for `if step is not None`",
        path="sm_tiered/restore.py",
        old="seen.candidates if step is None else",
        new="seen.candidates if not step else",
        tests=(f"{PROMISES}::test_step_0_can_be_chosen",),
    ),
    Mutant(
        name="what is above the watermark is recycled",
        path="sm_tiered/generations.py",
        old="        watermark = self.watermark\n",
        new="        watermark = self.line[-1] if self.line else self.watermark\n",
        tests=(f"{NODES}::test_a_slow_rank_that_dies_while_others_go_on_takes_nothing_acknowledged_with_it",),
    ),
    Mutant(
        name="no lease is asked for before recycling",
        path="sm_tiered/tiers/slot.py",
        old="            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)\n",
        new="",
        tests=(f"{NODES}::test_what_a_reader_has_open_never_changes_while_saves_go_on",),
    ),
    Mutant(
        name="a file with a second name is recycled",
        path="sm_tiered/tiers/slot.py",
        old="        if self.links != 1:\n",
        new="        if False:\n",
        tests=(f"{NODES}::test_a_user_s_hard_link_keeps_its_bytes",),
    ),
    Mutant(
        name="files are deleted without a tombstone",
        path="sm_tiered/graves.py",
        old="        tier.replace(key, manifest_to_json(grave), version=standing.version)\n",
        new="        pass\n",
        tests=(f"{PROMISES}::test_what_is_deleted_is_a_tombstone_first",),
    ),
    Mutant(
        name="retention deletes what an attempt began from",
        path="sm_tiered/retention.py",
        old=" | _protected_parents(tier, attempts, attempt)",
        new="",
        tests=(f"{PROMISES}::test_the_step_that_a_job_began_from_stays_when_retention_would_take_it",),
    ),
    Mutant(
        name="lineage forgets that a step was chosen",
        path="sm_tiered/lineage.py",
        old="fork = record.parent if record is not None and record.chosen else None",
        new="fork = None",
        tests=(f"{PROMISES}::test_a_chosen_step_is_the_newest_from_then_on",),
    ),
    Mutant(
        name="attempts are ordered by the clock",
        path="sm_tiered/lineage.py",
        old="ordinal=1 + max((attempt.ordinal for attempt in seen), default=0)",
        new="ordinal=1",
        tests=(f"{NODES}::test_a_new_rank_0_with_a_clock_five_minutes_wrong_changes_neither_order_nor_what_is_kept",),
    ),
    Mutant(
        name="a tier that does not answer counts as empty",
        path="sm_tiered/resolve.py",
        old="            unreachable[name] = str(error)\n",
        new="            checkpoints[name] = []\n",
        tests=(f"{PROMISES}::test_a_tier_that_does_not_answer_is_not_an_empty_one",),
    ),
    Mutant(
        name="the watermark is not looked at: what is gone never was",
        path="sm_tiered/restore.py",
        old="candidate.watermarked or candidate.problem is None",
        new="candidate.problem is None",
        tests=(f"{PROMISES}::test_what_is_gone_is_not_taken_for_what_never_was",),
    ),
    Mutant(
        name="a launch that restores nothing recycles what it finds",
        path="sm_tiered/line.py",
        old="            self._keep_newest(seen)\n",
        new="",
        tests=(f"{NODES}::test_launches_that_die_before_their_first_save_is_whole_take_nothing_with_them",),
    ),
    Mutant(
        name="two drainers work at once",
        path="sm_tiered/drainer.py",
        old="text=str(os.getpid())):\n        return 0\n",
        new="text=str(os.getpid())):\n        pass\n",
        tests=(f"{NODES}::test_a_drainer_that_finds_another_at_work_leaves_it_to_that_one",),
    ),
    Mutant(
        name="stored values are unpickled without weights_only",
        path="integrations/sm_tiered_dcp/values.py",
        old="        return _loaded(stream, weights_only=True)\n",
        new="        return _loaded(stream, weights_only=False)\n",
        tests=("tests/integrations/test_values.py",),
    ),
    Mutant(
        name="a save that failed counts as one of those that are kept",
        path="sm_tiered/generations.py",
        old="not done and c < whole[0]",
        new="False and c < whole[0]",
        tests=("tests/unit/test_generations.py",),
    ),
    Mutant(
        name="an archive that is packed again takes a tensor that moved for the one that stood there",
        path="integrations/sm_tiered_dcp/archive_pickles.py",
        old="    return storage._cdata, storage.nbytes(), value.requires_grad, *identity(value)\n",
        new="    return value.requires_grad, *identity(value)[1:]\n",
        tests=("tests/integrations/test_archive.py",),
    ),
    Mutant(
        name="what an archive holds is not proven to load safely",
        path="integrations/sm_tiered_dcp/archive.py",
        old="if self._allow_pickle or (",
        new="if True or (",
        tests=("tests/integrations/test_archive.py",),
    ),
    Mutant(
        name="files under other names are not listed before they are written",
        path="sm_tiered/stager.py",
        old="        put_file_list(memory, record, parts)\n",
        new="",
        tests=("tests/integrations/test_tiered_files.py",),
    ),
    Mutant(
        name="two ranks may bring a file of one name",
        path="integrations/sm_tiered_dcp/file_saver.py",
        old="            if owners.setdefault(name, rank) != rank:\n",
        new="            if False:\n",
        tests=("tests/integrations/test_tiered_files.py::test_two_ranks_with_one_name_are_told_and_go_on",),
    ),
    Mutant(
        name="each rank sees rank 0's own file",
        path="sm_tiered/handout.py",
        old="for name in shared}, **own}",
        new="for name in shared}}",
        tests=("tests/integrations/test_tiered_files.py::test_each_rank_sees_its_own",),
    ),
    Mutant(
        name="a file is handed out as memory has it, whatever its digest",
        path="sm_tiered/file_loader.py",
        old="(source.rank, source.item.part): [(0, source.item.length)]",
        new="(source.rank, source.item.part): [(0, 1)]",
        tests=(
            "tests/accelerate/test_attach.py::test_damage_is_found_and_never_loaded",
            "tests/integrations/test_tiered_files.py::test_a_flipped_bit_leads_to_the_next_tier_then_to_an_error",
        ),
    ),
    Mutant(
        name="another setup is not refused before Accelerate loads",
        path="integrations/sm_tiered_accelerate/stock.py",
        old="            facts.check(stored, self._accelerator)\n",
        new="",
        tests=("tests/accelerate/test_attach.py::test_another_setup_is_refused_before_anything_is_touched",),
    ),
    Mutant(
        name="what the fetch ahead has drawn is drawn again",
        path="integrations/sm_tiered_accelerate/loaders.py",
        old='        RngState().load_state_dict(resumes["ahead"])\n',
        new="",
        tests=("tests/accelerate/test_loaders.py",),
    ),
    Mutant(
        name="the end of a block lets the loaders go before it saves",
        path="integrations/sm_tiered_accelerate/attached.py",
        old="            self._files.__exit__(kind, error, trace)\n",
        new="            self._stock.loaders.release()\n            self._files.__exit__(kind, error, trace)\n",
        tests=("tests/accelerate/test_loaders.py::test_the_end_of_a_block_in_mid_epoch",),
    ),
    Mutant(
        name="the Trainer's files are taken in before all ranks have written theirs",
        path="integrations/sm_tiered_accelerate/trainer_files.py",
        old="        self.files.gather(None)  # until then files come and go here\n",
        new="",
        tests=("tests/accelerate/test_trainer.py", "tests/accelerate/test_trainer_files.py"),
    ),
    Mutant(
        name="a request that was answered asks again at each step",
        path="sm_tiered/schedule.py",
        old="            self.requests.take()\n",
        new="            pass\n",
        tests=("tests/unit/test_schedule.py::test_a_request_is_answered_by_one_save",),
    ),
    Mutant(
        name="rank 0's own cost of a save is what counts",
        path="sm_tiered/schedule.py",
        old="max(self._cost.secs or 0.0, self._slowest_secs)",
        new="self._cost.secs or 0.0",
        tests=("tests/properties/test_policies_agree.py::test_the_slowest_rank_tells_what_a_save_costs",),
    ),
    Mutant(
        name="policies are shown what changes under their eyes",
        path="sm_tiered/schedule.py",
        old="dict(self._extremes.get(tier.name, Extremes()).found)",
        new="self._extremes.get(tier.name, Extremes()).found",
        tests=("tests/properties/test_policies_agree.py",),
    ),
    Mutant(
        name="what was best before a restart is forgotten",
        path="sm_tiered/schedule.py",
        old="            self._extremes[tier] = extremes\n",
        new="            pass\n",
        tests=("tests/unit/test_schedule.py::test_what_was_saved_before_a_restart_counts_too",),
    ),
    Mutant(
        name="the save that plans counts as a typical one",
        path="sm_tiered/history.py",
        old="            self._secs.clear()\n",
        new="            pass\n",
        tests=("tests/unit/test_schedule.py",),
    ),
    Mutant(
        name="every restart counts as the loss of a node",
        path="sm_tiered/history.py",
        old="    found = dict.fromkeys(durable, lost)\n",
        new="    found = dict.fromkeys(durable, len(restarts))\n",
        tests=("tests/unit/test_schedule.py::test_a_tier_counts_the_failures_that_it_is_there_for",),
    ),
    Mutant(
        name="the interval is twice the best",
        path="sm_tiered/policies/optimum.py",
        old="    return math.sqrt(2 * cost_secs * mtbf_secs)",
        new="    return 2 * math.sqrt(2 * cost_secs * mtbf_secs)",
        tests=("tests/unit/test_optimum.py::test_no_fixed_interval_is_better_by_more_than_2_percent",),
    ),
    Mutant(
        name="what all ranks know is counted by each of them",
        path="sm_tiered/metrics_table.py",
        old='"rank 0": rank == 0,',
        new='"rank 0": rank is not None,',
        tests=("tests/unit/test_metrics.py::test_ranks_measure_what_is_theirs_and_rank_0_what_all_know",),
    ),
    Mutant(
        name="a meter provider that fails is asked again with every event",
        path="sm_tiered/metrics.py",
        old="if type(event) not in FED or self._given_up:",
        new="if type(event) not in FED:",
        tests=("tests/unit/test_metrics.py::test_a_provider_that_fails_is_given_up_once_and_said",),
    ),
    Mutant(
        name="the lag of a durable save is not told",
        path="sm_tiered/ledger.py",
        old="max(0, self._saved_step - handle.step)",
        new="0",
        tests=("tests/unit/test_durable_saves_are_told.py",),
    ),
    Mutant(
        name="a log line names the line that logs instead of the one that tells",
        path="sm_tiered/event_log.py",
        old=", stacklevel=2",
        new="",
        tests=("tests/unit/test_logs.py",),
    ),
    Mutant(
        name="a traceback in the log may forge a line",
        path="sm_tiered/log_lines.py",
        old="{_INDENT}{printable(below)}",
        new="{below}",
        tests=("tests/unit/test_logs.py",),
    ),
    Mutant(
        name="a log file follows a link",
        path="sm_tiered/log_files.py",
        old="| os.O_NOFOLLOW | os.O_NONBLOCK",
        new="| os.O_NONBLOCK",
        tests=("tests/unit/test_logs.py",),
    ),
    Mutant(
        name="a share that is gone still makes a commit",
        path="sm_tiered/commit.py",
        old="if anew and isinstance(tier, ShareTier):",
        new="if False:",
        tests=("tests/unit/test_drain_of_shares.py::test_a_share_that_goes_before_the_commit_makes_it_wait",),
    ),
    Mutant(
        name="what lost a share counts among what is kept",
        path="sm_tiered/retention.py",
        old="if not tier.confirm(checkpoint, tell=False):",
        new="if False:",
        tests=("tests/unit/test_drain_of_shares.py::test_what_lost_a_share_does_not_count_among_what_is_kept",),
    ),
    Mutant(
        name="a service that is away keeps a save in flight",
        path="sm_tiered/drain.py",
        old="if overdue or not first.patient:",
        new="if overdue:",
        tests=("tests/unit/test_drain_of_shares.py",),
    ),
    Mutant(
        name="a silent service and nothing else is a fresh start",
        path="sm_tiered/restore.py",
        old="    if skipped and not state.placed:\n        raise unknown(*next(iter(skipped.items())))\n",
        new="",
        tests=(
            "tests/distributed/test_cluster_tier.py::test_a_start_that_can_t_tell_whether_anything_was_saved_is_no_fresh_start",
        ),
    ),
    Mutant(
        name="every parent stays in the cluster's memory",
        path="sm_tiered/retention.py",
        old="attempts = {attempt: record for attempt, record in attempts.items() if attempt == asking}",
        new="pass",
        tests=("tests/unit/test_drain_of_shares.py::test_only_what_the_newest_attempt_went_on_from_stays",),
    ),
)
"""All of them."""
