/* fwp.h is plain C99: one write and one read by hand, and one refused call. */
#include <stdio.h>
#include <string.h>

#include "fwp/fwp.h"

static DLTensor tensor(double* data, int32_t ndim, int64_t* shape) {
  DLTensor t;
  memset(&t, 0, sizeof t);
  t.data = data;
  t.device.device_type = kDLCPU;
  t.ndim = ndim;
  t.dtype.code = kDLFloat;
  t.dtype.bits = 64;
  t.dtype.lanes = 1;
  t.shape = shape;
  return t;
}

int main(void) {
  int64_t rows[4] = {1, 1, 1, 2}, wrong[4] = {1, 1, 1, 3}, scalars[3] = {1, 1, 1};
  double key[3] = {1, 0, 0}, value[2] = {3, 5}, strength[1] = {0.5}, output[2] = {0, 0};
  DLTensor k = tensor(key, 4, rows), q = k, v = tensor(value, 4, rows), beta = tensor(strength, 3, scalars);
  DLTensor o = tensor(output, 4, rows);
  fwp_options options = FWP_OPTIONS_INIT;
  fwp_inputs inputs = FWP_INPUTS_INIT;
  fwp_outputs outputs = FWP_OUTPUTS_INIT;
  inputs.q = &q;
  inputs.k = &k;
  inputs.v = &v;
  inputs.beta = &beta;
  outputs.o = &o;
  options.scale = 2;

  /* A zero state predicts 0, half of the error is written, and the read is doubled: o = v. */
  if (fwp_delta_fwd(&options, &inputs, &outputs, NULL, 0, NULL) != FWP_OK) {
    fprintf(stderr, "fwp_delta_fwd: %s\n", fwp_last_error());
    return 1;
  }
  if (output[0] != 3 || output[1] != 5) {
    fprintf(stderr, "o: expected (3, 5), got (%g, %g)\n", output[0], output[1]);
    return 1;
  }

  q = tensor(key, 4, wrong);
  if (fwp_delta_fwd(&options, &inputs, &outputs, NULL, 0, NULL) != FWP_SHAPE_ERROR || !*fwp_last_error()) {
    fprintf(stderr, "keys and queries of different sizes were accepted\n");
    return 1;
  }
  return 0;
}
