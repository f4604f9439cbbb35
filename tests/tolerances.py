"""Every tolerance of the test suite, each with its reason. None is loosened without a cause written here."""

# float64 on both sides: what is left is the order of sums, so these bars are about truth.
BOXES_F64 = 1e-6  # px
SCORES_F64 = 1e-9
STAGE_F64 = 1e-9  # of the stage's largest value: ~60 layers of float64 rounding
INVARIANCE_F64 = 1e-9  # px and score: another bucket or neighbour changes only the order of sums

# float32 on both sides, of the stage's largest value: seen 3e-7 (pixels) to 2e-6 (heads), 60 layers deep.
STAGE_F32 = 2e-5
# Proposals differ by 1e-4 px after exp() of their offsets, and the maps' slope (several per cell) carries that on.
ROI_STAGE_F32 = 5e-4

# float32 on both sides: torchvision against itself in float64 moves by .022 px and 1.3e-4 on such cases.
BOXES_F32 = 0.05  # px
SCORES_F32 = 5e-4

# Ops, identical inputs on both sides.
OP_F64 = 1e-12  # relative: a handful of operations
OP_F32 = 2e-6  # relative: a handful of operations at 6e-8 each
# Of the largest feature (about 3), absolute: coordinates up to 50 px round to 4e-6 px, and features differ by up to 6
# from one pixel to the next.
ROI_ALIGN_F32 = 3e-5
ROI_ALIGN_BF16 = 2e-2  # of the largest feature: features and results have 8 bits

# Training in float64, sampling exhaustive on both sides.
LOSS_F64 = 1e-9  # relative, and absolute where a loss is zero
GRADIENT_F64 = 1e-7  # of each tensor's norm: thousands of terms that cancel, through 60 layers
GRADIENT_FLOOR_F64 = 1e-12  # where the norm itself is rounding
BATCH_STATS_F64 = 1e-9  # relative
