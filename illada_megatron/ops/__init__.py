"""Operations on tensors that more than one layout shares: the masked linear cross-entropy."""
