"""Rows of docs/compatibility.md, each with the test that proves it; `other_nodes/test_table.py` keeps them equal."""

from dataclasses import dataclass

WORKS, PARTLY, REFUSED = "works", "partly", "refused"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: The neighbour.
        verdict: WORKS, PARTLY or REFUSED.
        note: What a user must know; for what is refused or warned of, the message stands in `message`.
        test: "folder/file::function"; the file is tests/<folder>/test_<file>.py.
        message: A part of what ComfyUI shows or logs, shown in the table in quotes.
    """

    what: str
    verdict: str
    note: str
    test: str
    message: str = ""


SECTIONS: dict[str, tuple[Row, ...]] = {
    "Weights": (
        Row(
            "LoRA before or after", WORKS, "Same picture to the bit.", "other_nodes/weights::test_lora_before_or_after"
        ),
        Row(
            "LoraLoaderBypass",
            WORKS,
            "In the reference pass too.",
            "other_nodes/weights::test_a_lora_in_bypass_mode_is_a_lora",
        ),
        Row(
            "LoRA hook on conditionings",
            WORKS,
            "The image tokens follow it.",
            "other_nodes/weights::test_a_lora_hook_on_both_prompts_is_a_lora",
        ),
        Row(
            "LoRA hook with Self-Attn Shortcut",
            PARTLY,
            "The reference is looked at without the hook's LoRA.",
            "other_nodes/weights::test_a_lora_hook_on_one_prompt",
        ),
        Row(
            "ModelMergeSimple before or after",
            WORKS,
            "After: connect our MODEL as `model1`; what is on `model2` is dropped by that node.",
            "other_nodes/weights::test_merges",
        ),
        Row(
            "fp16, bf16, fp8 UNet",
            WORKS,
            "Distance from fp32 at most twice that of the plain UNet.",
            "other_nodes/weights::test_precisions",
        ),
        Row(
            "Select Model Device before our nodes",
            WORKS,
            "The adapter computes where it is, once per run.",
            "sampling/cards::test_the_adapter_computes_where_it_is",
        ),
        Row(
            "Select Model Device after our nodes",
            WORKS,
            "The adapter goes with the model.",
            "sampling/cards::test_select_model_device_after_our_nodes",
        ),
        Row(
            "--lowvram, --novram",
            WORKS,
            "ComfyUI's loading in these modes, tried on the CPU: weights are cast layer by layer.",
            "other_nodes/weights::test_partly_loaded_models",
        ),
        Row(
            "v-prediction, zero terminal SNR, LCM",
            WORKS,
            "ModelSamplingDiscrete before or after.",
            "other_nodes/guidance::test_other_model_samplings",
        ),
        Row("SDXL and other models", REFUSED, "", "nodes/refusals::test_sdxl", "works with SD1.5 checkpoints only"),
    ),
    "Control and other image prompts": (
        Row("ControlNet", WORKS, "On one prompt or both.", "other_nodes/control::test_control"),
        Row("T2I-Adapter", WORKS, "On one prompt or both.", "other_nodes/control::test_control"),
        Row(
            "ControlNet and the reference",
            WORKS,
            "The reference pass is not controlled.",
            "other_nodes/control::test_the_reference_pass_is_not_controlled",
        ),
        Row(
            "IPAdapter_plus before or after",
            WORKS,
            "Weights, ranges, masks, several; its own nodes, run where the tests can fetch them.",
            "other_nodes/ipadapter::test_both_orders_give_the_same_picture",
        ),
        Row(
            "Packs that share a slot as IPAdapter_plus does",
            WORKS,
            "Set, or `add` where the slot is taken.",
            "other_nodes/attention::test_ipadapter_before_and_after",
        ),
        Row(
            "Attention replacements with weights of their own",
            WORKS,
            "ComfyUI still moves and loads them.",
            "sampling/chaining::test_comfyui_reaches_what_sat_in_the_slot",
        ),
        Row(
            "Packs that take a slot without `add`",
            WORKS,
            "Before or after; both act.",
            "other_nodes/attention::test_who_takes_our_slot_does_not_take_our_place",
        ),
    ),
    "Guidance": (
        Row(
            "PAG, SAG, RescaleCFG, CFG-Zero",
            WORKS,
            "Either order.",
            "other_nodes/guidance::test_guidance_in_either_order",
        ),
        Row(
            "Skip-layer guidance",
            WORKS,
            "Tried with one made for this UNet; its extra evaluation does not touch the mask.",
            "other_nodes/guidance::test_guidance_in_either_order",
        ),
        Row("FreeU, NAG", WORKS, "Either order.", "other_nodes/guidance::test_changed_features_in_either_order"),
        Row("Perp-Neg (guider and node)", WORKS, "Both agree.", "other_nodes/guidance::test_both_perp_neg_nodes_agree"),
        Row(
            "Dual Model CFG Guider",
            PARTLY,
            "What runs on its other model is taken for a negative prompt: no image tokens, no mask from it. The "
            "shortcut is in it too.",
            "other_nodes/guidance::test_a_negative_prompt_on_another_model_is_said",
            "another node evaluates prompts that are not among those of the run",
        ),
        Row("CFG 1, LCM", WORKS, "No negative prompt is needed.", "other_nodes/guidance::test_lcm_without_guidance"),
    ),
    "Sampling": (
        Row("Every stock sampler", WORKS, "", "sampling/sampling::test_every_sampler"),
        Row("Every stock scheduler", WORKS, "", "sampling/sampling::test_every_scheduler"),
        Row(
            "Several evaluations per step",
            WORKS,
            "Each uses the mask of the one before.",
            "other_nodes/sampling::test_samplers_that_evaluate_several_times_per_step",
        ),
        Row(
            "SamplerCustomAdvanced",
            WORKS,
            "As KSampler.",
            "other_nodes/guidance::test_sampler_custom_advanced_is_the_ksampler",
        ),
        Row("Img2img", WORKS, "", "sampling/sampling::test_img2img"),
        Row(
            "Deep Shrink (PatchModelAddDownscale)",
            WORKS,
            "Masks follow the layers' sizes.",
            "other_nodes/guidance::test_changed_features_in_either_order",
        ),
        Row("Hires fix", WORKS, "Two sizes on one patched MODEL.", "other_nodes/sampling::test_hires_fix"),
        Row("Noise mask", WORKS, "What is kept stays.", "other_nodes/sampling::test_noise_mask"),
        Row(
            "Differential Diffusion",
            WORKS,
            "Either order.",
            "other_nodes/sampling::test_differential_diffusion_in_either_order",
        ),
        Row("SD1.5 inpaint checkpoint", WORKS, "9 channels.", "other_nodes/sampling::test_inpaint_checkpoint"),
        Row(
            "InstructPix2Pix, IC-Light",
            WORKS,
            "Their channels replayed: 4 or 8 beside the latent; the reference pass shows the reference in them.",
            "other_nodes/sampling::test_models_that_are_shown_pictures_beside_the_latent",
        ),
        Row(
            "KSampler (Advanced) in parts",
            PARTLY,
            "The first evaluation of each part has no automatic mask: the features reach the whole picture in it.",
            "other_nodes/sampling::test_ksampler_advanced_in_two_parts",
        ),
    ),
    "Prompts": (
        Row(
            "Set Area",
            WORKS,
            "The mask lies in the area of the prompt that has the subject.",
            "other_nodes/regions::test_set_area",
        ),
        Row(
            "Set Mask",
            WORKS,
            'As a region_mask there. With "mask bounds" the subject is looked for inside only; else everywhere.',
            "other_nodes/regions::test_set_mask",
        ),
        Row(
            "Set Mask, other prompts",
            WORKS,
            "They get exactly nothing of the subject outside of its prompt's mask.",
            "other_nodes/regions::test_the_other_prompts_get_nothing_of_the_subject_outside_its_mask",
        ),
        Row(
            "Combine, several positives",
            WORKS,
            "Prompts without the subject do not water its mask down.",
            "other_nodes/regions::test_combine_takes_the_mask_from_the_prompts_that_know",
        ),
        Row(
            "Concat",
            PARTLY,
            "Connect the prompt with the subject as `conditioning_to`; the node forgets the other's marks.",
            "other_nodes/regions::test_concat_keeps_the_tokens_of_conditioning_to",
        ),
        Row(
            "Timestep ranges",
            WORKS,
            "While no prompt has the subject, its last mask stays.",
            "other_nodes/regions::test_timestep_ranges",
        ),
        Row("Over 77 tokens, unequal lengths", WORKS, "", "sampling/sampling::test_long_and_unequal_prompts"),
        Row(
            "Prompt from another text encoder",
            PARTLY,
            "No automatic mask, until MoMA Mark Subject follows.",
            "other_nodes/subjects::test_a_prompt_that_knows_nothing_is_said_aloud",
            "no positive prompt of this run knows where the subject",
        ),
    ),
    "Several subjects": (
        Row(
            "Two subjects in one prompt",
            WORKS,
            "MoMA Text Encode, then MoMA Mark Subject.",
            "other_nodes/subjects::test_two_subjects_in_one_text_are_told_apart",
        ),
        Row(
            "Two regions",
            WORKS,
            "Outside its region a subject adds exactly nothing.",
            "other_nodes/subjects::test_no_bleeding_between_regions",
        ),
        Row(
            "Automatic masks",
            WORKS,
            "Each from its own tokens alone.",
            "other_nodes/subjects::test_a_mask_comes_from_its_own_tokens_alone",
        ),
        Row(
            "Memory",
            WORKS,
            "One set of adapter weights for all.",
            "other_nodes/subjects::test_one_set_of_adapter_weights",
        ),
        Row(
            "Several references of one subject",
            WORKS,
            "Combine MoMA Subjects; one pass for each, once.",
            "sampling/references::test_the_shortcut_looks_at_the_union_of_the_references",
        ),
    ),
    "Batches": (
        Row(
            "Batch",
            WORKS,
            "Each picture is what it is alone.",
            "sampling/sampling::test_a_batch_equals_its_images_alone",
        ),
        Row("Latent From Batch", WORKS, "", "other_nodes/batches::test_latent_batch_index"),
        Row(
            "Region masks: one, N, fewer, more",
            WORKS,
            "Fewer repeat; more are not used.",
            "other_nodes/batches::test_region_masks_of_any_count",
        ),
        Row(
            "Context Windows (Manual)",
            WORKS,
            "Masks and regions follow the frames.",
            "other_nodes/batches::test_overlapping_context_windows",
        ),
        Row(
            "AnimateDiff-style sub-batches",
            WORKS,
            "Its slicing replayed on this UNet; its own code was not run.",
            "other_nodes/batches::test_animatediff_sub_batches",
        ),
        Row(
            "Motion modules injected into the UNet",
            WORKS,
            "The reference pass goes without them.",
            "other_nodes/batches::test_the_reference_pass_goes_without_motion_modules",
        ),
    ),
    "Tiles, crops, single steps": (
        Row(
            "UltimateSDUpscale",
            WORKS,
            "Its own code. A region_mask, or the mask of a prompt, follows the tiles (batch_size 1): in the tile of a "
            "region another picture by over 0.1, in others less than 0.02. Without either the subject is in no tile.",
            "other_nodes/tiles::test_ultimate_sd_upscale",
            "works on tiles of the picture, and nothing says where in the picture the subject is",
        ),
        Row(
            "UltimateSDUpscale with Conditioning (Set Mask)",
            WORKS,
            "Its own code; the same figures.",
            "other_nodes/tiles::test_ultimate_sd_upscale_crops_the_mask_of_a_prompt",
        ),
        Row(
            "Tiled KSampler (BlenderNeko)",
            PARTLY,
            "Its own code. It tells only the areas of prompts (masks need an older ComfyUI): without one the "
            "subject is in no tile.",
            "other_nodes/tiles::test_tiled_ksampler",
            "works on tiles of the picture, and it does not tell where they are in it",
        ),
        Row(
            "Tiled KSampler with Conditioning (Set Area)",
            WORKS,
            "Its own code. The subject is in the tile of its area, by over 0.05, and exactly nowhere else.",
            "other_nodes/tiles::test_tiled_ksampler_crops_the_area_of_a_prompt",
        ),
        Row(
            "Impact detailers",
            PARTLY,
            "Its own code. The subject is looked for in each crop. With Conditioning (Set Mask) it is in the crops "
            "where its prompt is; a subject with a region_mask stays out.",
            "other_nodes/tiles::test_impact_detailer",
            "works on several pictures or parts of one",
        ),
        Row(
            "Impact RegionalSampler",
            WORKS,
            "Its own code. Each step is a run: all but the first have the mask of the one before.",
            "other_nodes/tiles::test_impact_regional_sampler",
        ),
        Row(
            "Nodes that sample step by step",
            WORKS,
            "Equal to one run of all steps.",
            "sampling/whereabouts::test_the_mask_goes_on_from_step_to_step_of_one_node",
            "stopped after one evaluation of the model",
        ),
        Row(
            "Other nodes that sample several pictures",
            PARTLY,
            "A warning, once for each time the node runs.",
            "sampling/whereabouts::test_unknown_nodes_on_several_pictures_are_warned_of_once",
            "works on several pictures or parts of one",
        ),
    ),
    "Speed-ups": (
        Row(
            "HyperTile",
            REFUSED,
            "With Self-Attn Shortcut, before sampling.",
            "other_nodes/attention::test_rearranged_tokens_are_refused_before_sampling",
            "MoMA: HyperTile on this model re-arranges the tokens of self-attention",
        ),
        Row(
            "Token Merging (TomePatchModel)",
            REFUSED,
            "With Self-Attn Shortcut, before sampling.",
            "other_nodes/attention::test_rearranged_tokens_are_refused_before_sampling",
            "MoMA: Token Merging (TomePatchModel) on this model re-arranges the tokens of self-attention",
        ),
        Row(
            "Both, with Apply MoMA Adapter alone",
            WORKS,
            "",
            "other_nodes/attention::test_rearranged_tokens_work_with_the_image_tokens_alone",
        ),
        Row(
            "Other nodes that re-arrange attention",
            REFUSED,
            "In the first step.",
            "other_nodes/attention::test_unknown_rearranging_is_refused_in_the_first_step",
            "another node changed the attention's input",
        ),
        Row(
            "EasyCache, LazyCache",
            WORKS,
            "Steps that they skip leave the mask as it is.",
            "other_nodes/sampling::test_skipped_steps",
        ),
        Row(
            "TorchCompileModel",
            WORKS,
            "Compiled once for all steps and later runs of a kind. Where torch cannot compile all of the UNet at once "
            "(a CPU's default attention, some packs' patches) the run goes on uncompiled, with a warning.",
            "other_nodes/compilation::test_one_compilation_serves_all_steps_and_later_runs",
            "MoMA: this run goes on without TorchCompileModel",
        ),
        Row(
            "TiledDiffusion",
            REFUSED,
            "Before sampling.",
            "other_nodes/attention::test_tiles_are_refused",
            "TiledDiffusion on this model cuts the picture into tiles",
        ),
        Row(
            "Other nodes that cut the picture into tiles",
            REFUSED,
            "In the first step.",
            "other_nodes/attention::test_tiles_are_refused",
            "another node changed the model's input",
        ),
        Row(
            "MultiGPU work units",
            REFUSED,
            "",
            "nodes/refusals::test_multigpu_is_refused",
            "MoMA does not work with MultiGPU work units",
        ),
    ),
    "Other packs, by their own code": (
        Row(
            "Dynamic Thresholding, Skimmed CFG, AutomaticCFG",
            WORKS,
            "The two orders differ by 0; with MoMA at zero the picture is theirs, by 0.",
            "other_nodes/packs::test_packs_that_work",
        ),
        Row(
            "Perturbed-attention pack: PAG, SEG",
            WORKS,
            "The two orders differ by 0; MoMA at zero: 0.",
            "other_nodes/packs::test_packs_that_work",
        ),
        Row(
            "Sliding Window Guidance up to its window",
            WORKS,
            "The two orders differ by 0; MoMA at zero: 0.",
            "other_nodes/packs::test_packs_that_work",
        ),
        Row(
            "Sliding Window Guidance above its window",
            REFUSED,
            "In the first step, naming the pack: its windows change the input's size.",
            "other_nodes/packs::test_packs_that_are_refused",
            "Nodes that cut the picture into tiles or windows do that",
        ),
        Row(
            "StyleAligned, share_norm too",
            WORKS,
            "The two orders differ by 0; MoMA at zero: 0.",
            "other_nodes/packs::test_packs_that_work",
        ),
        Row(
            "AnimateDiff-Evolved sampling",
            WORKS,
            "Its context windows without a motion model: frames differ from those without windows by less than 1e-4.",
            "other_nodes/packs::test_packs_that_work",
        ),
        Row(
            "RES4LYF (ClownsharKSampler), LanPaint",
            WORKS,
            "Their samplers find the mask too; MoMA at zero: 0.",
            "other_nodes/packs::test_packs_that_sample",
        ),
        Row(
            "Advanced-ControlNet Reference",
            WORKS,
            "Its forward over the reference is what it is without MoMA, by 0. What style fidelity adds "
            "for the negative rows goes without the shortcut.",
            "other_nodes/packs::test_advanced_controlnet_reference",
        ),
        Row(
            "WaveSpeed first-block cache",
            WORKS,
            "Masks come from whole forwards only; while the cache answers, the last one stays. The two "
            "orders differ by 0.",
            "other_nodes/packs::test_packs_that_work",
        ),
        Row(
            "BrushNet, PowerPaint after MoMA",
            WORKS,
            "They replace the wrappers of the nodes before them; MoMA is put back for the run, with a "
            "warning: the picture differs by 0.",
            "other_nodes/removals::test_what_is_taken_off_is_put_back_and_named",
            "Apply MoMA's nodes after BrushNet, PowerPaint",
        ),
        Row(
            "ELLA",
            WORKS,
            "With MoMA Mark Subject after it, which finds CLIP's text behind ELLA's 64 tokens.",
            "other_nodes/packs::test_ella",
        ),
        Row(
            "DenseDiffusion",
            PARTLY,
            "Its prompt is a new one: no automatic mask, until MoMA Mark Subject follows it.",
            "other_nodes/packs::test_dense_diffusion_forgets_the_marks",
            "no positive prompt of this run knows where the subject",
        ),
        Row(
            "LayerDiffuse (SD1.5)",
            REFUSED,
            "Before sampling: its attention units have no place for the features.",
            "other_nodes/forwards::test_replaced_attention_layers_are_refused_before_sampling",
            "LayerDiffuse does that on SD1.5",
        ),
        Row(
            "Attention couple (cgem156)",
            REFUSED,
            "Before sampling.",
            "other_nodes/packs::test_packs_that_are_refused",
            "MoMA: the attention couple of",
        ),
        Row(
            "Attention couple (ppm)",
            REFUSED,
            "Before sampling.",
            "other_nodes/packs::test_packs_that_are_refused",
            "MoMA: the attention couple of",
        ),
        Row(
            "Attention couple (prompt-control)",
            REFUSED,
            "Before sampling; it comes with the prompts.",
            "other_nodes/packs::test_a_couple_in_the_prompts_is_refused",
            "MoMA: the attention couple of",
        ),
    ),
    "What other packs do": (
        Row(
            "Nodes that run the UNet for something else",
            WORKS,
            "Only forwards over the run's own latent get the features and feed the mask: the picture differs by 0.",
            "other_nodes/forwards::test_an_extra_forward_changes_nothing",
        ),
        Row(
            "Nodes that change the latent on its way to the UNet",
            WORKS,
            "Where they run the UNet once per evaluation.",
            "other_nodes/forwards::test_a_latent_that_is_changed_on_its_way_is_still_the_runs_own",
        ),
        Row(
            "Nodes that replace the text during the run",
            PARTLY,
            "No automatic mask.",
            "other_nodes/forwards::test_text_that_was_not_marked_is_not_looked_at",
            "another node gives the model other text than the prompts",
        ),
        Row(
            "XY plots that load the checkpoint anew (Efficiency)",
            PARTLY,
            "A MODEL that did not go through MoMA's nodes is without it: plot what lies behind them.",
            "other_nodes/removals::test_without_all_of_it_the_model_is_a_fresh_one",
        ),
        Row(
            "Guiders that evaluate with model options of their own",
            REFUSED,
            "At the end of the run. Copies of the run's options work.",
            "other_nodes/removals::test_options_that_are_made_anew_within_an_evaluation_are_refused",
            "another node samples with options of its own",
        ),
        Row(
            "Nodes that put patches around MoMA's",
            WORKS,
            "The features are added once.",
            "other_nodes/removals::test_a_patch_around_ours_does_not_double_the_features",
        ),
        Row(
            "Nodes that replace MoMA's self-attention patches within an evaluation",
            PARTLY,
            "No Self-Attn Shortcut, no automatic mask.",
            "other_nodes/removals::test_a_shortcut_that_is_taken_away_within_an_evaluation_is_said",
            "came to MoMA's patches in all self-attention layers",
        ),
        Row(
            "Engines that run the UNet in place of ComfyUI",
            REFUSED,
            "In the first step.",
            "other_nodes/forwards::test_a_unet_without_attention_is_refused",
            "another node runs this model without its attention layers",
        ),
    ),
}


def message(what: str) -> str:
    """The message of a row: what its test must find."""
    return next(row.message for rows in SECTIONS.values() for row in rows if row.what == what)
