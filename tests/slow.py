"""Tests that `make test-fast` leaves out because they take 5 s or more, all their parameters together, on two cores.

Measured, not estimated: `pytest --durations=0`. A test that has become quick is taken out, one that has become slow is
put in; `tests/test_markers.py` finds names that no longer exist.
"""

SLOW = {
    "tests/backend/test_cache_groups.py": {
        "test_a_mixed_step_equals_the_oracle_in_every_layer",
    },
    "tests/backend/test_decode_steps.py": {
        "test_a_request_reads_the_same_with_and_without_others",
        "test_every_step_equals_the_oracle_in_every_layer",
    },
    "tests/backend/test_forward.py": {
        "test_a_row_alone_equals_the_oracle",
        "test_dense_rows_of_a_mixed_step_equal_the_stock_step",
        "test_each_of_several_chunks_reads_what_it_would_alone",
        "test_rows_in_any_order_equal_the_oracle",
        "test_t2_and_t4_a_mixed_step_equals_the_oracle_in_every_layer",
        "test_t9_steps_are_independent",
        "test_tokens_before_the_minimum_read_everything",
    },
    "tests/backend/test_guard.py": {"test_neighbours_are_not_touched"},
    "tests/backend/test_soft_cap_and_sinks.py": {
        "test_a_mixed_step_equals_the_oracle",
        "test_the_executor_equals_the_oracle",
    },
    "tests/backend/test_summaries.py": {
        "test_a_prefix_in_the_cache",
        "test_a_prefix_that_requests_without_summaries_wrote",
    },
    "tests/deploy/test_environment.py": {
        "test_serve_flags_are_ones_that_vllm_takes",
        "test_the_fastest_dtype_is_served",
    },
    "tests/deploy/test_checkers.py": {
        "test_accepts_every_example_and_the_image",
    },
    "tests/deploy/test_release.py": {
        "test_every_example_is_installed",
    },
    "tests/inspect/test_command.py": {
        "test_a_page_is_written_and_progress_is_shown",
    },
    "tests/kernels/test_candidate_tokens_triton.py": {
        "test_kernels_compile_for_hopper",
    },
    "tests/kernels/test_code_scores_triton.py": {
        "test_kernels_compile_for_hopper",
    },
    "tests/kernels/test_compilation.py": {
        "test_no_decode_step_waits_for_the_compiler",
    },
    "tests/kernels/test_cuda_library.py": {
        "test_sources_compile_with_nvcc_alone_and_load_without_a_gpu",
    },
    "tests/kernels/test_flex_estimate.py": {
        "test_estimate_equals_full_attention",
        "test_token_profiles_equal_full_attention",
    },
    "tests/kernels/test_hip_decode_triton.py": {
        "test_kernels_compile_for_hopper",
    },
    "tests/kernels/test_low_bit_scores.py": {
        "test_thresholds_are_relative_to_sink_and_local_window",
    },
    "tests/kernels/test_low_bit_scores_triton.py": {
        "test_kernels_compile_for_hopper",
    },
    "tests/kernels/test_page_scores_triton.py": {
        "test_kernels_compile_for_hopper",
    },
    "tests/kernels/test_page_summaries_triton.py": {
        "test_kernel_compiles_for_hopper",
    },
    "tests/kernels/test_targets.py": {
        "test_kernels_compile",
        "test_kernels_that_read_an_fp8_cache_compile",
    },
    "tests/loadtest/test_harness.py": {
        "test_a_sweep_ends_where_the_slo_breaks",
        "test_a_thousand_streams",
        "test_an_interrupted_run_reports_what_ran",
        "test_the_rate_is_what_the_server_sustains",
        "test_times_tokens_and_answers_are_the_servers",
    },
    "tests/loadtest/test_agreement.py": {
        "test_times_are_the_servers_to_a_millisecond",
        "test_peers_say_the_same",
    },
    "tests/loadtest/test_pages.py": {
        "test_a_page_compares_runs",
    },
    "tests/loadtest/test_verdict.py": {
        "test_a_rate_that_is_wanted_has_to_be_held",
        "test_the_exit_status_follows_the_conditions",
    },
    "tests/loadtest/test_clients.py": {
        "test_the_command_starts_and_ends_them",
    },
    "tests/loadtest/test_search.py": {
        "test_each_methods_highest_rate_is_found",
    },
    "tests/loadtest/test_export.py": {
        "test_ratios_of_few_pairs_are_grey_and_in_parentheses",
    },
    "tests/loadtest/test_stream.py": {
        "test_only_tokens_count",
    },
    "tests/loadtest/test_decode_losses.py": {
        "test_the_table_of_a_prompt",
    },
    "tests/loadtest/test_load_command.py": {
        "test_runs_of_other_prompts_are_compared_without_pairs",
        "test_two_runs_are_compared_in_pairs",
    },
    "tests/methods/test_flexprefill.py": {
        "test_f11_output_equals_the_softmax_over_the_exported_set",
        "test_f1_gamma_of_one_is_dense",
        "test_f4_and_f5_the_pooled_map_covers_gamma_with_no_block_too_many",
        "test_f6_more_gamma_or_budget_keeps_more",
        "test_faithful_mode_reproduces_the_official_counts",
    },
    "tests/methods/test_hip.py": {
        "test_h10_one_head_has_one_choice",
        "test_h4_descents_equal_plain_python",
        "test_h5_a_run_of_good_keys_is_found_wherever_it_lies",
        "test_h5_the_peak_of_a_smooth_score_is_found",
    },
    "tests/methods/test_matrix.py": {
        "test_decode_equals_the_oracle_over_its_list",
        "test_decode_lists_are_well_formed",
        "test_prefill_dense_limit",
        "test_prefill_equals_the_oracle_over_its_list",
    },
    "tests/methods/test_sale.py": {
        "test_s1_a_tau_of_0_is_dense",
        "test_s3_no_key_with_a_probability_of_tau_is_dropped",
    },
    "tests/methods/test_together.py": {
        "test_chunks_together_get_what_each_gets_alone",
    },
    "tests/metrics/test_directory.py": {
        "test_a_killed_servers_directory_is_removed_by_the_next_and_a_running_ones_is_not",
    },
    "tests/metrics/test_recall.py": {
        "test_chunk",
    },
    "tests/metrics/test_worker.py": {
        "test_a_worker_writes_where_the_server_announced",
    },
    "tests/model/test_ruler.py": {
        "test_training_lowers_the_loss_and_the_exam_says_what_is_right",
    },
    "tests/model/test_train.py": {
        "test_whole_run_in_miniature",
    },
    "tests/model/test_widen.py": {
        "test_folder_answers_right",
        "test_logits_are_the_bundled_models",
    },
    "tests/quality/test_recall.py": {
        "test_layers_that_are_dense_keep_everything",
        "test_oracle_decodes_with_the_best_list_of_its_kv_head",
        "test_oracle_is_the_best_list_and_random_is_not",
        "test_recall_equals_a_float64_softmax",
        "test_records_are_of_each_text_and_sparse_phase",
        "test_short_texts_run_dense",
    },
    "tests/server/test_admission.py": {
        "test_a_request_keeps_what_it_was_parsed_to",
    },
    "tests/server/test_runtime_config.py": {
        "test_the_directory_is_made_only_where_the_routes_are_loaded",
    },
    "tests/test_any_settings.py": {
        "test_any_configuration_is_taken_or_refused",
        "test_any_extras_are_taken_or_refused_with_their_key",
    },
    "tests/test_calibrate_sale.py": {
        "test_s11_every_prompt_is_within_the_bound",
        "test_the_command_calibrates_the_bundled_model",
        "test_the_command_names_what_is_wrong",
    },
    "tests/test_calibrate_tokentopk.py": {
        "test_bounds_keep_layers_out",
        "test_the_command_calibrates_the_bundled_model",
    },
    "tests/test_calibrate_tidal.py": {
        "test_the_command_calibrates_the_bundled_model",
    },
    "tests/test_command.py": {
        "test_a_benchmark_prints_a_table",
        "test_the_decode_benchmark_prints_a_table",
    },
    "tests/test_cpu_library.py": {
        "test_the_library_is_the_processors",
    },
    "tests/test_keys.py": {
        "test_keys_are_read_as_written",
    },
    "tests/test_plugin.py": {
        "test_the_backend_unpickles_where_no_plugin_was_loaded",
        "test_workers_do_not_load_the_servers_room",
    },
}
