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

# times the error of XLA's plain sum, root mean square: 2.1 by experiment and 2.2 by the sum of squares of F(4, 3)'s
# coefficients (F(2, 3), which was here before, has 1.3 and was allowed 2.0); torch's plain sum has 2.2 on the same maps
WINOGRAD_F32 = 2.5

# Training in float64, sampling exhaustive on both sides.
LOSS_F64 = 1e-9  # relative, and absolute where a loss is zero
GRADIENT_F64 = 1e-7  # of each tensor's norm: thousands of terms that cancel, through 60 layers
GRADIENT_FLOOR_F64 = 1e-12  # where the norm itself is rounding
BATCH_STATS_F64 = 1e-9  # relative
GRADIENT_F32 = 1e-5  # of RoIAlign, of the largest value: the sum of some hundred products of 6e-8 each

# float32 with a known answer, or the same arithmetic in another program.
HAND_F32 = 1e-6  # relative: answers worked out by hand, a few operations at 6e-8 each
HAND_EPS_F32 = 1e-5  # relative: the answer worked out by hand leaves out BatchNorm's eps of 1e-5
LAYERS_F32 = 1e-5  # absolute, values of order 1 after a few layers, whose sums XLA orders by the shape of the array
NET_F32 = 1e-4  # absolute, values of order 10 at a detector's end, or sums over a whole map in a gradient
NET_PROPOSALS_F32 = 1e-3  # px, the same after exp() of the offsets and times the anchor
NORM_F32 = 2e-5  # of values of order 10: sums over 300 cells, and their order
DECODED_F32 = 1e-2  # px, encoded and decoded again: boxes of 1e5 px keep 7 digits
DECODED_F64 = 1e-10  # px, the same with 16 digits

# Pixels. Normalised ones reach 2.6, and both sides do the same handful of operations: seen 1e-6 and 2e-15.
PIXELS_F32 = 5e-6
PIXELS_F64 = 1e-13
PIXELS_SCALED_F32 = 2e-6  # uint8 divided by 255 on the device or before: one rounding more
PIXELS_BF16 = 0.02  # bfloat16 images: 8 bits leave .002 of 1, which a std of .22 turns into .009
JPEG_LEVELS = 12  # of 255: what lossy compression at quality 95 and more moves a pixel by
GIF_LEVELS = 4  # of 255: what a palette of 256 colours moves it by

# Inside one model in float64: the same operations on an array of another size.
CANVAS_STAGE_F64 = 1e-11  # of the stage's largest value

# A norm of float32 numbers with a mean of 1000 deviations: an ulp of such a number is 6e-5 deviations.
LARGE_MEAN_F32 = 1e-3

# bfloat16 against float32 through the small form of a detector: 8 bits, errors of a per cent after 15 layers, so that
# boxes of 100 px move by pixels, and detections near the threshold or an NMS decision come and go.
BOXES_BF16 = 8.0  # px
SCORES_BF16 = 0.1
SHARE_BF16 = 0.7  # of the detections that must be found again

# The reference itself: torchvision in float32 against itself in float64 on lively weights.
LIVELY_BOXES = 0.02  # px
LIVELY_SCORES = 1.5e-4
SUM_OF_16_F32 = 1e-6  # of values of order 1, added in another order than C++'s

# Evaluation. pycocotools adds an eps of 2e-16 to denominators, and takes means over 10 x 101 numbers.
AP_HAND = 1e-9  # absolute: worked out by hand
AP_SAME = 1e-12  # absolute: the same sums in the same program
AP_THREE_DECIMALS = 5e-4  # absolute: what the figures of the shared checkpoints are given to (seen: all four decimals)

# Data. numpy rounds where XLA contracts a product and a sum into one operation: seen 1e-6 of 2.6.
PIXELS_NUMPY = 2e-6
PIXELS_MIRRORED = 1e-4  # the positions of a resize from the right round otherwise by 1e-5 px than those from the left
BOXES_MIRRORED = 1e-4  # px, float32 coordinates of up to 96 flipped before the resize or after
JITTER_LEVEL = 1  # of 255: Pillow and torch round the antialiased resize in other places

# Training.
TEN_STEPS_F64 = 1e-9  # of each tensor's norm: the rounding of one step grows in the nine after it; seen 6e-13
DEVICES_F64 = 1e-9  # relative, of each tensor's norm: the order of sums
DEVICES_FLOOR_F64 = 1e-12  # gradients of biases before BatchNorm are zero, and what is left is rounding
DEVICES_LOSS_F32 = 1e-4  # relative: the order of sums
LR_F64 = 1e-10  # relative: torch multiplies the rate by a factor at every iteration, a thousand roundings
SGD_F64 = 1e-12  # relative: thirty steps of a few operations
LOSS_BF16 = 0.05  # relative: 8 bits through ten layers
GRADIENT_NORM_BF16 = 0.2  # relative, the same: gradients sum and cancel what losses average
RATE_F32 = 1e-5  # relative: a rate after a warm-up of float32 steps and two multiplications
STEP_F32 = 1e-5  # relative: a loss or norm, over some hundred values, in two programs
STEP_FLOOR_F32 = 1e-7  # absolute, where a parameter is near 0: rounding of values of order 1
CLIPPED_F32 = 1e-3  # relative: the norm of a difference of parameters of order 1 that moved by .01

# Fresh class layers, drawn at random: statistics of more than 100,000 values (FCOS) and of some hundred up.
INIT_STD = 0.02  # relative: nine standard errors of 1 / sqrt(2 n)
INIT_MEAN = 2e-4  # absolute: six standard errors of .01 / sqrt(n)
INIT_BOUND = 0.1  # relative: the extremes of a uniform draw lie that near to its bounds

# bfloat16's gradients against float32's, of each tensor's norm: ours over torch autocast's on the same weights. Each
# side rounds each layer's maps to 8 bits, in its own order: seen .97 to .99 (median), .94 and 1.02 (largest).
GRADIENT_BF16_MEDIAN = 1.2
GRADIENT_BF16_LARGEST = 1.2
# A sum over 8410 or 4480 cells in float32 of bfloat16 terms, one rounding of each term to bfloat16 before it: .03 to 3
# where the sum is bfloat16.
SUM_BF16 = 1e-3
# The same convolution of bfloat16 numbers in another program: sums in float32, rounded to 8 bits.
CONV_BF16 = 2**-7

# benchmarks/accelerator.py at toy size, whose maps have few cells and whose norms divide by small spreads: float32
# gradients of a whole ResNet-50 against torch's, of each tensor's norm (seen .0019, .0085); and the parts, of the
# largest value, where some compute in bfloat16.
TOY_GRADIENTS_MEDIAN = 0.01
TOY_GRADIENTS_LARGEST = 0.1
TOY_PARTS = 0.02
