#pragma once

namespace fastvit {

// Fill the outputs that fastvit::attention.cpu and attention_qkvpacked.cpu allocate with NaN first: for tests.
void poison_outputs(bool wanted);

}  // namespace fastvit
