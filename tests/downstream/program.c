/* Writes one value under one key with the delta rule and reads it back. */
#include <fwp/fwp.h>
#include <stdio.h>

int main(void) {
  int64_t rows[] = {1, 1, 1, 2}, scalars[] = {1, 1, 1};
  float key[] = {0.6f, 0.8f}, value[] = {3, 5}, strength[] = {1}, output[] = {0, 0};
  const DLDevice cpu = {kDLCPU, 0};
  const DLDataType float32 = {kDLFloat, 32, 1};
  const DLTensor k = {key, cpu, 4, float32, rows, NULL, 0};
  const DLTensor v = {value, cpu, 4, float32, rows, NULL, 0};
  const DLTensor beta = {strength, cpu, 3, float32, scalars, NULL, 0};
  const DLTensor o = {output, cpu, 4, float32, rows, NULL, 0};

  const fwp_options options = FWP_OPTIONS_INIT;
  fwp_inputs inputs = FWP_INPUTS_INIT;
  fwp_outputs outputs = FWP_OUTPUTS_INIT;
  inputs.q = &k;
  inputs.k = &k;
  inputs.v = &v;
  inputs.beta = &beta;
  outputs.o = &o;
  if (fwp_delta_fwd(&options, &inputs, &outputs, NULL, 0, NULL) != FWP_OK) {
    fprintf(stderr, "%s\n", fwp_last_error());
    return 1;
  }
  printf("fwp_core %s read %.3f %.3f\n", fwp_version(), output[0], output[1]);
  return 0;
}
