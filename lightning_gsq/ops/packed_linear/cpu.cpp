// Packed linear layers on a CPU, for values of GSQ_BITS bits. Compiled by cpu.py at first use, for the machine it runs on.
//
// A unit is 8 consecutive values, which take exactly `bits` bytes. A vector's lanes are N consecutive units, so that
// every shift is a constant and nothing crosses lanes: field f of all units at once is shift, mask, convert,
// multiply-add. Units wider than 32 bits, and those that no integer type has the size of, are read as two quads of 4
// values, each within 32 bits from some byte on. Inputs are laid out to match: x_BFN, block, field, lane.
//
// A block (8 N values) lies within one group, whose scale therefore applies once to a vector of sums. With levels
// m (q - c), the sum of x m (q - c) starts at -c times the unit's sum of x, and m (2 for 1 bit, else 1) comes last.
#include <cstdint>
#include <cstring>

template <int N, typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <int N>
using Floats = typename VectorOf<N, float>::type;
template <int N>
using Ints = typename VectorOf<N, int32_t>::type;
template <int N>
using Words = typename VectorOf<N, uint32_t>::type;

enum Kind { FP32 = 0, FP16 = 1, BF16 = 2 };

static inline float widen(const void* p, int64_t i, int kind) {
  if (kind == FP32) return static_cast<const float*>(p)[i];
  if (kind == FP16) return static_cast<const _Float16*>(p)[i];
  uint32_t bits = uint32_t(static_cast<const uint16_t*>(p)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <int BITS>
constexpr float CENTRE = BITS == 1 ? 0.5f : float(1 << (BITS - 1));
template <int BITS>
constexpr float STEP = BITS == 1 ? 2.0f : 1.0f;

template <typename T>
static inline T read(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

constexpr int REACH = 128;  // bytes from a block's start on that may be read

#ifdef __AVX512VBMI__
// Bytes first(i) ... first(i) + 3 of p in lane i, by one permutation.
template <int BITS, int N>
static inline Words<N> spread(const uint8_t* p, int half) {
  typedef uint8_t Bytes __attribute__((vector_size(64)));
  Bytes index = {};
  for (int i = 0; i < N; i++)
    for (int j = 0; j < 4; j++) index[4 * i + j] = i * BITS + half * (BITS / 2) + j;
  const Bytes low = read<Bytes>(p);
  Bytes chosen;
  if constexpr (N * BITS + 4 <= 64) {
    chosen = __builtin_shuffle(low, index);
  } else {
    chosen = __builtin_shuffle(low, read<Bytes>(p + 64), index);
  }
  return read<Words<N>>(reinterpret_cast<const uint8_t*>(&chosen));
}
#else
template <int BITS, int N>
static inline Words<N> spread(const uint8_t* p, int half) {
  Words<N> w;
  for (int i = 0; i < N; i++) w[i] = read<uint32_t>(p + i * BITS + half * (BITS / 2));
  return w;
}
#endif

// Fields 0-3 (half 0) or 4-7 (half 1) of N units from p on.
template <int BITS, int N>
static inline Words<N> quads(const uint8_t* p, int half) {
  if constexpr (BITS == 1) return __builtin_convertvector(read<typename VectorOf<N, uint8_t>::type>(p), Words<N>);
  if constexpr (BITS == 2) return __builtin_convertvector(read<typename VectorOf<N, uint16_t>::type>(p), Words<N>);
  if constexpr (BITS == 4) return read<Words<N>>(p);
  return spread<BITS, N>(p, half);
}
template <int BITS>
constexpr bool WHOLE = BITS == 1 || BITS == 2 || BITS == 4;  // a unit is one integer
template <int BITS>
constexpr int shift_of(int field) {
  return WHOLE<BITS> || field < 4 ? field * BITS : (4 * BITS) % 8 + (field - 4) * BITS;
}

template <int BITS, int N, int R, int T>
static inline void block(
    const uint8_t* const (&p)[R], const float* x_TFN, const float* sums_TN, int64_t x_stride, int64_t sum_stride,
    Floats<N> (&acc)[R][T]) {
  Words<N> w[R];
  for (int t = 0; t < T; t++) {
    Floats<N> start = -read<Floats<N>>(reinterpret_cast<const uint8_t*>(sums_TN + t * sum_stride));
    for (int r = 0; r < R; r++) acc[r][t] = start;
  }
#pragma GCC unroll 8
  for (int f = 0; f < 8; f++) {
    if (f == 0 || (f == 4 && !WHOLE<BITS>))
      for (int r = 0; r < R; r++) w[r] = quads<BITS, N>(p[r], f / 4);
    Floats<N> q[R];
    for (int r = 0; r < R; r++) {
      Words<N> field = (w[r] >> shift_of<BITS>(f)) & ((1u << BITS) - 1);
      q[r] = __builtin_convertvector((Ints<N>)field, Floats<N>);
    }
    for (int t = 0; t < T; t++) {
      Floats<N> x = read<Floats<N>>(reinterpret_cast<const uint8_t*>(x_TFN + t * x_stride + f * N));
      for (int r = 0; r < R; r++) acc[r][t] += q[r] * x;
    }
  }
}

struct Shape {
  int64_t rows, words, groups, blocks, blocks_per_group;
};

// Rows row ... row + R - 1 times T tokens.
template <int BITS, int N, int R, int T>
static void rows_of(
    float* y_TO, const float* x_TBFN, const float* sums_TBN, const uint8_t* words, const void* scales, int scale_kind,
    int64_t row, const Shape& s) {
  Floats<N> total[R][T] = {};
  const int64_t x_stride = s.blocks * 8 * N, sum_stride = s.blocks * N, row_bytes = 4 * s.words;
  // Blocks whose reads would reach beyond the row are read from a copy.
  const int64_t inside = row_bytes < REACH ? 0 : (row_bytes - REACH) / (N * BITS) + 1;
  uint8_t tail[R][2 * REACH + N * BITS] = {};
  const uint8_t* p[R];
  for (int r = 0; r < R; r++)
    std::memcpy(tail[r], words + (row + r) * row_bytes + inside * N * BITS, row_bytes - inside * N * BITS);
  for (int64_t g = 0, b = 0; g < s.groups; g++) {
    Floats<N> sum[R][T] = {}, acc[R][T];
    const int64_t end = g + 1 == s.groups ? s.blocks : b + s.blocks_per_group;
    for (; b < end; b++) {
      for (int r = 0; r < R; r++)
        p[r] = b < inside ? words + (row + r) * row_bytes + b * N * BITS : tail[r] + (b - inside) * N * BITS;
      block<BITS, N, R, T>(p, x_TBFN + b * 8 * N, sums_TBN + b * N, x_stride, sum_stride, acc);
      for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) sum[r][t] += acc[r][t];
    }
    for (int r = 0; r < R; r++) {
      const float scale = widen(scales, (row + r) * s.groups + g, scale_kind) * STEP<BITS>;
      for (int t = 0; t < T; t++) total[r][t] += sum[r][t] * scale;
    }
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) {
      float y = 0;
      for (int i = 0; i < N; i++) y += total[r][t][i];
      y_TO[t * s.rows + row + r] = y;
    }
}

// Lays x_TI out as block, field, lane, zeros beyond I, and sums every unit times its levels' centre.
template <int BITS, int N>
static void lay_out(float* x_TBFN, float* sums_TBN, const float* x_TI, int64_t tokens, int64_t columns, int64_t blocks) {
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t unit = 0; unit < blocks * N; unit++) {
      float sum = 0, *to = x_TBFN + (t * blocks + unit / N) * 8 * N + unit % N;
      for (int f = 0; f < 8; f++) {
        const int64_t i = unit * 8 + f;
        const float value = i < columns ? x_TI[t * columns + i] : 0.0f;
        to[f * N] = value;
        sum += value;
      }
      sums_TBN[t * blocks * N + unit] = sum * CENTRE<BITS>;
    }
}

template <int BITS, int N, int R, int T>
static void tokens_of(
    float* y, const float* x, const float* sums, const uint8_t* words, const void* scales, int kind, const Shape& s) {
  const int64_t full = s.rows / R;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < full; i++) rows_of<BITS, N, R, T>(y, x, sums, words, scales, kind, i * R, s);
  for (int64_t row = full * R; row < s.rows; row++) rows_of<BITS, N, 1, T>(y, x, sums, words, scales, kind, row, s);
}

template <int BITS, int N>
static void linear(
    float* y, const float* x_TI, float* scratch, const uint8_t* words, const void* scales, int kind, int64_t tokens,
    int64_t columns, const Shape& s) {
  const int64_t x_stride = s.blocks * 8 * N, sum_stride = s.blocks * N;
  float *x = scratch, *sums = scratch + tokens * x_stride;
  lay_out<BITS, N>(x, sums, x_TI, tokens, columns, s.blocks);
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4)
    tokens_of<BITS, N, 2, 4>(y + t * s.rows, x + t * x_stride, sums + t * sum_stride, words, scales, kind, s);
  for (; t + 2 <= tokens; t += 2)
    tokens_of<BITS, N, 4, 2>(y + t * s.rows, x + t * x_stride, sums + t * sum_stride, words, scales, kind, s);
  for (; t < tokens; t++)
    tokens_of<BITS, N, 4, 1>(y + t * s.rows, x + t * x_stride, sums + t * sum_stride, words, scales, kind, s);
}

// The first count of 8 values. A copy of a length that the compiler knows is one instruction.
template <typename V, typename T>
static inline void store(T* to, const V& values, int64_t count) {
  if (count == 8) {
    std::memcpy(to, &values, 8 * sizeof(T));
  } else {
    std::memcpy(to, &values, count * sizeof(T));
  }
}

template <int BITS>
static void dequantize(
    void* out, int out_kind, const uint8_t* words, const void* scales, int kind, int64_t rows, int64_t columns,
    int64_t row_words, int64_t groups, int64_t group_length) {
  const Words<8> shift = {0, BITS, 2 * BITS, 3 * BITS, 4 * BITS % 8, 4 * BITS % 8 + BITS, 4 * BITS % 8 + 2 * BITS,
                          4 * BITS % 8 + 3 * BITS};
  const bool whole = groups == 1 || group_length % 8 == 0;  // a unit lies in one group
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const uint8_t* p = words + row * 4 * row_words;
    uint8_t tail[8] = {};
    int64_t group = 0, left = 0;  // values of the group that are still to come
    float scale = 0;
    for (int64_t start = 0; start < columns; start += 8) {
      const int64_t count = columns - start < 8 ? columns - start : 8, offset = start / 8 * BITS;
      const uint8_t* from = p + offset;
      if (offset + 8 > 4 * row_words) {
        std::memcpy(tail, from, 4 * row_words - offset);
        from = tail;
      }
      const uint32_t low = read<uint32_t>(from), high = read<uint32_t>(from + BITS / 2);
      const Words<8> both = {low, low, low, low, high, high, high, high};
      Words<8> field = (both >> shift) & ((1u << BITS) - 1);
      Floats<8> value = (__builtin_convertvector((Ints<8>)field, Floats<8>) - CENTRE<BITS>) * STEP<BITS>;
      if (whole) {
        if (left == 0) {
          scale = widen(scales, row * groups + group++, kind);
          left = groups == 1 ? columns + 8 : group_length;
        }
        left -= 8;
        value *= scale;
      } else {
        for (int i = 0; i < count; i++) value[i] *= widen(scales, row * groups + (start + i) / group_length, kind);
      }
      const int64_t to = row * columns + start;
      if (out_kind == FP32) {
        store(static_cast<float*>(out) + to, value, count);
      } else if (out_kind == FP16) {
        typename VectorOf<8, _Float16>::type half = __builtin_convertvector(value, typename VectorOf<8, _Float16>::type);
        store(static_cast<uint16_t*>(out) + to, half, count);
      } else {
        Words<8> bits = (Words<8>)value;
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even; weights are finite
        typename VectorOf<8, uint16_t>::type half = __builtin_convertvector(bits, typename VectorOf<8, uint16_t>::type);
        store(static_cast<uint16_t*>(out) + to, half, count);
      }
    }
  }
}

// y_TO = x_TI w^T. group_length is a multiple of 32, or there is one group. scratch holds tokens * 9 * (columns + 128).
extern "C" void gsq_packed_linear(
    float* y, const float* x, float* scratch, const void* words, const void* scales, int scale_kind, int64_t tokens,
    int64_t rows, int64_t columns, int64_t row_words, int64_t groups, int64_t group_length) {
  const int lanes = groups == 1 || group_length % 128 == 0 ? 16 : group_length % 64 == 0 ? 8 : 4;
  const Shape s = {rows, row_words, groups, (columns + 8 * lanes - 1) / (8 * lanes), group_length / (8 * lanes)};
  const auto run = lanes == 16 ? linear<GSQ_BITS, 16> : lanes == 8 ? linear<GSQ_BITS, 8> : linear<GSQ_BITS, 4>;
  run(y, x, scratch, static_cast<const uint8_t*>(words), scales, scale_kind, tokens, columns, s);
}

// As above for weights that lie one after the other: tokens offsets[e] ... offsets[e + 1] - 1 meet weight e. Those of
// weights with more tokens than most are left as they are. scratch holds most * 9 * (columns + 128).
extern "C" void gsq_grouped_linear(
    float* y, const float* x, float* scratch, const void* words, const void* scales, int scale_kind,
    const int64_t* offsets, int64_t experts, int64_t most, int64_t rows, int64_t columns, int64_t row_words,
    int64_t groups, int64_t group_length) {
  const int64_t scale_bytes = scale_kind == FP32 ? 4 : 2;
  for (int64_t e = 0; e < experts; e++) {
    const int64_t first = offsets[e], tokens = offsets[e + 1] - first;
    if (tokens < 1 || tokens > most) continue;
    gsq_packed_linear(
        y + first * rows, x + first * columns, scratch, static_cast<const uint8_t*>(words) + e * rows * 4 * row_words,
        static_cast<const uint8_t*>(scales) + e * rows * groups * scale_bytes, scale_kind, tokens, rows, columns,
        row_words, groups, group_length);
  }
}

// The dense weight, rows * columns, as fp32, fp16 or bf16.
extern "C" void gsq_dequantize(
    void* out, int out_kind, const void* words, const void* scales, int scale_kind, int64_t rows, int64_t columns,
    int64_t row_words, int64_t groups, int64_t group_length) {
  dequantize<GSQ_BITS>(
      out, out_kind, static_cast<const uint8_t*>(words), scales, scale_kind, rows, columns, row_words, groups,
      group_length);
}
