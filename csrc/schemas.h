// The schemas of torch.ops.dspa.*, shared by the library for the CPU and the one for GPUs.
#pragma once

// What encoding needs of an SAE.
#define DSPA_ENCODER_SCHEMA                                                                                      \
  "Tensor W_enc, Tensor b_enc, Tensor threshold, Tensor? b_dec, Tensor? decoder_norm, Tensor? magnitude_scale, " \
  "Tensor? magnitude_bias, str activation, int k, str normalization"

// An argument called "mode" would collide with one inside torch.compile.
#define DSPA_TOKEN_STEP_SCHEMA                                                                                    \
  "token_step(Tensor(a!) hidden, " DSPA_ENCODER_SCHEMA                                                            \
  ", Tensor W_dec, Tensor? decoder_rows, Tensor latents, Tensor signs, Tensor counts, float alpha, "              \
  "Tensor? alpha_of_row, Tensor? enabled, Tensor(b!)? seen, Tensor(c!)? edited, Tensor(d!)? nonfinite, "          \
  "Tensor(e!)? maximum, Tensor(f!)? maximum_sum, Tensor(g!)? maximum_known, Tensor(h!)? latent_edits, "           \
  "Tensor(i!)? recent_argmax, Tensor? codes, Tensor? code_factors, Tensor(j!)? work, str step_mode) -> ()"

#define DSPA_ADAPTER_STEP_SCHEMA                                                                                \
  "adapter_step(Tensor(a!) hidden, " DSPA_ENCODER_SCHEMA                                                        \
  ", Tensor W_dec, Tensor? decoder_rows, Tensor weight, Tensor bias, Tensor adapter_threshold, "                 \
  "str adapter_activation, bool clip, Tensor? enabled, Tensor(b!)? seen, Tensor(c!)? edited, "                   \
  "Tensor(d!)? nonfinite, Tensor(e!)? latent_edits, Tensor? codes, Tensor? code_factors, Tensor(f!)? work) -> ()"

#define DSPA_ENCODE_DENSITY_SCHEMA \
  "encode_density(Tensor hidden, Tensor offsets, " DSPA_ENCODER_SCHEMA ", Tensor(a!) counts) -> ()"

#define DSPA_LOOKUP_SCHEMA                                                                                         \
  "lookup(Tensor density, Tensor row_offsets, Tensor columns, Tensor values, int d_sae_out, int k_prompt, "        \
  "int k_diff, str edit, bool sign_guard, Tensor(a!) latents, Tensor(b!) signs, Tensor(c!) counts) -> ()"
