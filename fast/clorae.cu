// C-LoRAE's expert layer as CUDA kernels, written to be read from top to bottom.
//
//     y_t = W_0 x_t + s (g1_t B_U A_U x_t + g2_t B_n A_n x_t),    n = the task of token t,
//
// (paper: arXiv 2505.06303, Eq. 3, 4, 6-8.)  The product with the frozen W_0 is cuBLAS's; all the
// rest passes through rank space, where a token is k = R + r numbers instead of D_out:
//
//     z_t = [A_U x_t ; A_n x_t]             shrink     D_in -> k, the gate in its epilogue
//     y_t += s [B_U B_n] [g1 z_U ; g2 z_n]  expand     k -> D_out, the gate in its prologue
//
// Letters (in this file): T tokens of the whole batch, D_in and D_out the widths of the linear
// (multiples of 8), R universal rank, r task rank, N tasks, s = alpha / R, k = R + r, W = k (+ 1
// for the gate) rounded up to 8.
//
// What lies where (row-major, 16-byte aligned, one element type E: bf16, or fp32):
//     A  [R + N r (+ 1), D_in]   universal rows, rows of task 0, 1, ..., then the gate row
//     Bt [R + N r, D_out]        B transposed, in the same order: then forward and backward are
//                                the same two operations on the same two packs
//     z  [T, W]                  codes: R universal columns, r of the token's own task, zeros
//     g  [T, 2]                  fp32: the weights of the universal and of the task expert
// The softmax of two logits is the sigmoid of their difference, so that one gate row suffices:
// W_g[0] - W_g[1], and g = (sigmoid(l), sigmoid(-l)).
//
// Backward, from dy = dL/dy and, where L_MIM is on, P = its gradient with respect to z:
//     q   = Bt dy                          [k]      shrink again, on dy
//     e_U = s <q_U, z_U>,  e_n = s <q_n, z_n>       the gradients of g1 and g2
//     dz  = s [g1 q_U ; g2 q_n] + P,  dl = g1 g2 (e_U - e_n) in the gate column
//     dx += A^T [dz ; dl]                           expand again, on A
// and the gradients of A and Bt are products over tokens, dz^T x and (s g z)^T dy, left to cuBLAS.
//
// Kernels: pack (fp32 parameters -> A and Bt), shrink and shrink_backward, expand.
// Every sum runs in an order fixed by the shapes: no atomics, the same bits every time.
//
// The file is compiled three times: by nvcc (kernels and launchers, no torch header: seconds), by
// the C++ compiler (the binding at the end) and, for machines without a GPU, by the C++ compiler
// with -DCLORAE_EMULATOR (everything, tests/emulator.h playing the GPU).

// ---------------------------------------------------------------- shared by kernels and binding

#include <cstdint>

struct Ranks {  // R, r, N
    int universal, task, tasks;
};

struct Segment {  // tokens [start, stop) belong to one task
    int task, start, stop;
};

// One matrix that `pack` rewrites: `count` matrices [rows, columns] of fp32, one after another.
enum PackKind { COPY, TRANSPOSE, DIFFERENCE };
struct PackJob {
    const float* source;
    void* target;
    int count, rows, columns, kind;
};

// Row stride W of z: 16-byte copies need whole groups of eight numbers.
inline int code_width(Ranks ranks, bool live) {
    return (ranks.universal + ranks.task + live + 7) / 8 * 8;
}

// What the launchers have in common.  `live`: the gate is computed, from the last row of A, and its
// logit's gradient is column k of dz; otherwise g is given and W counts no such column.  (Under
// dropout the codes read dropped x and the gate reads x: two calls of shrink, one without the gate
// row in A, one with nothing else, R = r = 0.)
struct Call {
    bool bf16, live;  // the element type E: bf16 or fp32
    Ranks ranks;
    float scale;
    int tokens;               // T
    const Segment* segments;  // of all T tokens in their order, in the GPU's memory
    int segment_count;
    void* stream;  // a cudaStream_t

    int width() const { return code_width(ranks, live); }
};

// The launchers answer null, or what the driver has against the launch.
extern "C" {
const char* clorae_pack(const Call& call, const PackJob* jobs, int count);
const char* clorae_shrink(const Call& call, const void* x, const void* A, int d, bool gate_row,
                          void* z, float* gates /* written from the gate row */);
const char* clorae_shrink_backward(const Call& call, const void* dy, const void* Bt, int d,
                                   const void* z, const float* gates,
                                   const void* upstream /* or null */, void* dz, void* weighted,
                                   float* dgates /* or null */);
const char* clorae_expand(const Call& call, const void* codes, const float* gates /* or null */,
                          const void* pack, int d, bool gate_row, bool accumulate, void* y);
}

#if defined(__CUDACC__) || defined(CLORAE_EMULATOR)
// ------------------------------------------------------------------------------------- the GPU

#ifdef CLORAE_EMULATOR
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <mma.h>

#include <type_traits>

#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

// 16 bytes from global to shared memory without passing through registers; zeros if not `inside`.
__device__ inline void copy_async(void* to, const void* from, bool inside) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    const int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "r"(bytes) : "memory");
}

// Closes the group of copies that this thread has begun since the last call.
__device__ inline void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `PENDING` of this thread's youngest groups are still under way.
template <int PENDING>
__device__ inline void wait_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// More than 48 KiB of shared memory must be asked for; what a block may have differs by GPU.
inline int shared_limit() {
    int device = 0, bytes = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return bytes;
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared, void* stream,
                   Arguments... arguments) {
    if (shared > 48 * 1024)
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(
        static_cast<Parameters>(arguments)...);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

using bf16 = __nv_bfloat16;

constexpr int MAX_JOBS = 64;  // per launch: they travel by value, as kernel parameters
constexpr int STAGES = 3;  // slabs in shared memory: one in use, two on their way
constexpr int SLAB_BYTES = 128;  // of each row in a slab: one cache line
constexpr int PADDING_BYTES = 16;  // after each row: rows 144 bytes apart use different banks

// Elements of a row in a slab, and the distance of its rows.
template <class E> constexpr int DEPTH = SLAB_BYTES / static_cast<int>(sizeof(E));
template <class E>
constexpr int SLAB_STRIDE = (SLAB_BYTES + PADDING_BYTES) / static_cast<int>(sizeof(E));

__device__ inline float to_float(bf16 value) { return __bfloat162float(value); }
__device__ inline float to_float(float value) { return value; }
template <class E> __device__ inline E from_float(float value);
template <> __device__ inline bf16 from_float<bf16>(float value) { return __float2bfloat16(value); }
template <> __device__ inline float from_float<float>(float value) { return value; }

__device__ inline float sigmoid(float logit) { return 1.0f / (1.0f + expf(-logit)); }

// Eight neighbours of a row, read and written by one or two 16-byte instructions.
template <class E> union Eight {
    E value[8];
    uint4 word[sizeof(E) / 2];
};

template <class E>
__device__ inline void load_eight(float (&to)[8], const E* from) {
    Eight<E> eight;
#pragma unroll
    for (int i = 0; i < int(sizeof(E)) / 2; ++i)
        eight.word[i] = reinterpret_cast<const uint4*>(from)[i];
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j] = to_float(eight.value[j]);
}

template <class E>
__device__ inline void store_eight(E* to, const float (&from)[8]) {
    Eight<E> eight;
#pragma unroll
    for (int j = 0; j < 8; ++j) eight.value[j] = from_float<E>(from[j]);
#pragma unroll
    for (int i = 0; i < int(sizeof(E)) / 2; ++i)  // an intrinsic, since nvcc splits plain stores
        __stcg(reinterpret_cast<uint4*>(to) + i, eight.word[i]);
}

// -------------------------------------------------------------------------------------------- pack

struct PackJobs {
    PackJob job[MAX_JOBS];
};

// pack: fp32 parameters -> the packs A and Bt in E: in training at each use of a layer, in
//     decoding once for all the tokens of a batch.
//     COPY        target = source                     A_U [R, D_in], A_T [N r, D_in]
//     TRANSPOSE   target_i = source_i^T               B_U [D_out, R], B_T [N, D_out, r]
//     DIFFERENCE  target = source[0] - source[1]      W_g [2, D_in]
// Tiling: block (x, y) does the x-th 32 x 32 square of job y; the square goes through shared
//     memory, so that reads and writes both run along rows. Its rows have 33 words: a column then
//     touches 32 different banks.
// Bytes: 4 per element read, sizeof(E) written; 5 jobs a layer, up to 64 jobs a launch.
template <class E>
__global__ void pack(PackJobs jobs) {
    SHARED_MEMORY(memory);
    float* square = reinterpret_cast<float*>(memory);
    const PackJob& job = jobs.job[blockIdx.y];
    const int rows = job.kind == DIFFERENCE ? 1 : job.rows, columns = job.columns;
    const int down = (rows + 31) / 32, across = (columns + 31) / 32;
    if (blockIdx.x >= static_cast<unsigned>(job.count * down * across)) return;
    const int which = blockIdx.x / (down * across), within = blockIdx.x % (down * across);
    const int top = within / across * 32, left = within % across * 32;
    const float* source = job.source + static_cast<int64_t>(which) * job.rows * columns;
    E* target = static_cast<E*>(job.target) + static_cast<int64_t>(which) * rows * columns;
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32;
    for (int i = first; i < 32; i += 8) {
        const int row = top + i, column = left + lane;
        if (row >= rows || column >= columns) continue;
        const float* from = source + static_cast<int64_t>(row) * columns + column;
        square[i * 33 + lane] = job.kind == DIFFERENCE ? from[0] - from[columns] : from[0];
    }
    __syncthreads();
    for (int i = first; i < 32; i += 8) {
        if (job.kind == TRANSPOSE) {
            const int row = left + i, column = top + lane;  // of the target [columns, rows]
            if (row < columns && column < rows)
                target[static_cast<int64_t>(row) * rows + column] =
                    from_float<E>(square[lane * 33 + i]);
        } else if (top + i < rows && left + lane < columns) {
            target[static_cast<int64_t>(top + i) * columns + left + lane] =
                from_float<E>(square[i * 33 + lane]);
        }
    }
}

// ----------------------------------------------- what shrink and expand share: tiles and products

// The segments lie in the GPU's memory, not among the launch's parameters: a CUDA graph may then
// replay the launch for other tasks, whose segments have come to the same place.
struct Segments {
    const Segment* first;
    int count;
};

struct Tile {  // `rows` tokens of one task, from token `start`
    int task, start, rows;
};

// The index-th tile of `height` tokens; a tile never crosses a segment's end. The host launches as
// many blocks as there can be tiles (see tile_count): the last ones may find no token.
__device__ inline Tile find_tile(Segments segments, int index, int height) {
    for (int i = 0; i < segments.count; ++i) {
        const Segment segment = segments.first[i];
        const int length = segment.stop - segment.start, tiles = (length + height - 1) / height;
        if (index < tiles) {
            const int left = length - index * height;
            return {segment.task, segment.start + index * height, left < height ? left : height};
        }
        index -= tiles;
    }
    return {0, 0, 0};
}

// Row of the pack that belongs to column c of a token's code; -1: none, the column is padding.
__device__ inline int pack_row(int c, int task, Ranks ranks, bool gate_row) {
    if (c < ranks.universal) return c;
    if (c < ranks.universal + ranks.task) return c + task * ranks.task;
    const bool gate = gate_row && c == ranks.universal + ranks.task;
    return gate ? ranks.universal + ranks.tasks * ranks.task : -1;
}

// Begins the copy of `rows` rows of COLUMNS elements to shared memory, from columns `first`... of
// a matrix with `limit` columns; row i comes from row source(i), or is zero where that is negative.
template <int COLUMNS, class E, class Source>
__device__ inline void copy_rows(E* to, int to_stride, int rows, const E* matrix, int64_t stride,
                                 int first, int limit, Source source) {
    constexpr int EACH = 16 / sizeof(E), PIECES = COLUMNS / EACH;
    for (int i = threadIdx.x; i < rows * PIECES; i += blockDim.x) {
        const int row = i / PIECES, column = i % PIECES * EACH, from = source(row);
        const bool inside = from >= 0 && first + column < limit;
        copy_async(to + row * to_stride + column,
                   inside ? matrix + from * stride + first + column : matrix, inside);
    }
}

// One warp's 16 x 16 F piece of a product a b, summed in fp32 registers.
//     a [16, depth], rows a_stride apart; b either as it is, [depth, 16 F], rows b_stride apart
//     (BY_ROWS), or as its transpose [16 F, depth]; both in shared memory; depth a multiple of 16.
template <class E, int F> struct WarpTile;

// bf16: tensor cores. A fragment is a 16 x 16 matrix spread over the warp's registers.
template <int F> struct WarpTile<bf16, F> {
    using Sum = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float>;
    Sum sum[F];

    __device__ void clear() {
#pragma unroll
        for (int f = 0; f < F; ++f) nvcuda::wmma::fill_fragment(sum[f], 0.0f);
    }

    template <bool BY_ROWS>
    __device__ void multiply(const bf16* a, int a_stride, const bf16* b, int b_stride, int depth) {
        using namespace nvcuda::wmma;
        using Order = std::conditional_t<BY_ROWS, row_major, col_major>;
#pragma unroll
        for (int k = 0; k < depth; k += 16) {
            fragment<matrix_a, 16, 16, 16, bf16, row_major> left;
            load_matrix_sync(left, a + k, a_stride);
#pragma unroll
            for (int f = 0; f < F; ++f) {
                fragment<matrix_b, 16, 16, 16, bf16, Order> right;
                load_matrix_sync(right, BY_ROWS ? b + k * b_stride + 16 * f
                                                : b + 16 * f * b_stride + k, b_stride);
                mma_sync(sum[f], left, right, sum[f]);
            }
        }
    }

    __device__ void store(float* to, int stride) const {
#pragma unroll
        for (int f = 0; f < F; ++f)
            nvcuda::wmma::store_matrix_sync(to + 16 * f, sum[f], stride,
                                            nvcuda::wmma::mem_row_major);
    }
};

// fp32: plain multiply-adds, since tensor cores would round the factors to tf32. Each lane owns
// 2 x 4 numbers of every 16 x 16 square.
template <int F> struct WarpTile<float, F> {
    float sum[F][2][4];

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < F * 8; ++i) sum[i / 8][i / 4 % 2][i % 4] = 0.0f;
    }

    template <bool BY_ROWS>
    __device__ void multiply(const float* a, int a_stride, const float* b, int b_stride,
                             int depth) {
        const int row = threadIdx.x % 32 / 4 * 2, column = threadIdx.x % 4 * 4;
        for (int k = 0; k < depth; ++k) {
            const float upper = a[row * a_stride + k], lower = a[(row + 1) * a_stride + k];
#pragma unroll
            for (int f = 0; f < F; ++f) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int c = 16 * f + column + j;
                    const float right = BY_ROWS ? b[k * b_stride + c] : b[c * b_stride + k];
                    sum[f][0][j] += upper * right;
                    sum[f][1][j] += lower * right;
                }
            }
        }
    }

    __device__ void store(float* to, int stride) const {
        const int row = threadIdx.x % 32 / 4 * 2, column = threadIdx.x % 4 * 4;
#pragma unroll
        for (int i = 0; i < F * 8; ++i)
            to[(row + i / 4 % 2) * stride + i / 8 * 16 + column + i % 4] =
                sum[i / 8][i / 4 % 2][i % 4];
    }
};

// Runs over `slabs` slabs of the inner dimension, with the next ones already on their way into the
// other stages.  load(slab, stage) begins the copies of a slab, prepare(slab, stage) may change
// what this thread itself has copied, multiply(stage) uses what all threads have copied.
template <class Load, class Prepare, class Multiply>
__device__ inline void pipeline(int slabs, Load load, Prepare prepare, Multiply multiply) {
    for (int slab = 0; slab < STAGES - 1; ++slab) {
        if (slab < slabs) load(slab, slab);
        close_group();  // also when empty: the count of groups stays in step with the slabs
    }
    for (int slab = 0; slab < slabs; ++slab) {
        wait_groups<STAGES - 2>();  // this thread's part of the slab has come
        prepare(slab, slab % STAGES);
        __syncthreads();  // everybody's has, and nobody still reads the stage that is filled next
        if (slab + STAGES - 1 < slabs) load(slab + STAGES - 1, (slab + STAGES - 1) % STAGES);
        close_group();
        multiply(slab % STAGES);
    }
    wait_groups<0>();
    __syncthreads();  // the stages are free for the epilogue
}

// ----------------------------------------------------------------------------------------- shrink

constexpr int SHRINK_GROUPS = 3;  // warps side by side, each 16 F columns wide: 48, 96 or 192
template <int F> constexpr int SHRINK_COLUMNS = 16 * F * SHRINK_GROUPS;
template <int F> constexpr int SHRINK_STRIDE = SHRINK_COLUMNS<F> + 4;  // of the fp32 products
template <int F> constexpr int SHRINK_PIECES = SHRINK_COLUMNS<F> / 8;  // pieces of eight in a row

template <class E, int F>
int shrink_bytes(int height) {
    const int stages = STAGES * (height + SHRINK_COLUMNS<F>) * SLAB_STRIDE<E> * int(sizeof(E));
    const int epilogue = height * (SHRINK_STRIDE<F> + 2 * SHRINK_PIECES<F>) * int(sizeof(float));
    return stages > epilogue ? stages : epilogue;
}

// The products x_t . pack_row(c) of the tile's tokens with columns first .. first + 48 F - 1, left
// as fp32 [height, SHRINK_STRIDE] at the start of shared memory.
//
//          inner dimension d, 128 bytes of it a slab        warps (height = 32):
//     x    [height, slab]   \                               | 0 | 1 | 2 |   16 rows, 16 F columns
//     pack [48 F, slab]^T   /  three slabs in flight        | 3 | 4 | 5 |   each
template <class E, int F>
__device__ float* shrink_products(const E* x, const E* matrix, int d, Tile tile, Ranks ranks,
                                  bool gate_row, int first, int height) {
    constexpr int COLUMNS = SHRINK_COLUMNS<F>, STRIDE = SLAB_STRIDE<E>;
    SHARED_MEMORY(memory);
    E* stages = reinterpret_cast<E*>(memory);
    const int stage_size = (height + COLUMNS) * STRIDE;
    const int warp = threadIdx.x / 32;
    const int top = warp / SHRINK_GROUPS * 16, left = warp % SHRINK_GROUPS * 16 * F;
    WarpTile<E, F> product;
    product.clear();
    auto load = [&](int slab, int stage) {
        E* to = stages + stage * stage_size;
        copy_rows<DEPTH<E>>(to, STRIDE, height, x, d, slab * DEPTH<E>, d, [&](int i) {
            return i < tile.rows ? tile.start + i : -1; });
        copy_rows<DEPTH<E>>(to + height * STRIDE, STRIDE, COLUMNS, matrix, d, slab * DEPTH<E>, d,
                            [&](int i) { return pack_row(first + i, tile.task, ranks, gate_row); });
    };
    auto multiply = [&](int stage) {
        const E* from = stages + stage * stage_size;
        product.template multiply<false>(from + top * STRIDE, STRIDE,
                                         from + (height + left) * STRIDE, STRIDE, DEPTH<E>);
    };
    pipeline((d + DEPTH<E> - 1) / DEPTH<E>, load, [](int, int) {}, multiply);
    float* sums = reinterpret_cast<float*>(memory);
    product.store(sums + top * SHRINK_STRIDE<F> + left, SHRINK_STRIDE<F>);
    __syncthreads();
    return sums;
}

// shrink: z = [A_U x ; A_n x], and the gate from its own column of the same product.
// Shapes: x [T, d], pack A, z [T, W], gates [T, 2] (written if A has its `gate_row`).
// Tiling: block (i, j) computes columns 48 F j ... of the i-th tile of 16, 32 or 64 tokens; few
//     tokens give narrow columns, so that more multiprocessors work.
// Bytes: x once per column block (T d), the k rows of A once per tile (from L2), T W written.
template <class E, int F>
__global__ void __launch_bounds__(384)
shrink(const E* x, const E* A, int d, Segments segments, Ranks ranks, bool gate_row, int width,
       int height, E* z, float* gates) {
    const Tile tile = find_tile(segments, blockIdx.x, height);
    if (tile.rows == 0) return;
    const int first = blockIdx.y * SHRINK_COLUMNS<F>, k = ranks.universal + ranks.task;
    const float* sums = shrink_products<E, F>(x, A, d, tile, ranks, gate_row, first, height);
    for (int i = threadIdx.x; i < tile.rows * SHRINK_PIECES<F>; i += blockDim.x) {
        const int row = i / SHRINK_PIECES<F>, column = i % SHRINK_PIECES<F> * 8;
        if (first + column >= width) continue;
        float code[8];
#pragma unroll
        for (int j = 0; j < 8; ++j)  // the logit's column and the padding after it become zero
            code[j] = first + column + j < k ? sums[row * SHRINK_STRIDE<F> + column + j] : 0.0f;
        store_eight(z + static_cast<int64_t>(tile.start + row) * width + first + column, code);
    }
    const int gate = k - first;  // the block that has the logits computes the gates
    if (!gate_row || gate < 0 || gate >= SHRINK_COLUMNS<F>) return;
    for (int row = threadIdx.x; row < tile.rows; row += blockDim.x) {
        const float logit = sums[row * SHRINK_STRIDE<F> + gate];
        gates[2 * (tile.start + row)] = sigmoid(logit);
        gates[2 * (tile.start + row) + 1] = sigmoid(-logit);  // 1 - g1 without cancellation
    }
}

// shrink_backward: q = Bt dy, and from it dz, dl and the weighted codes s (g1 z_U, g2 z_n) that
// the gradient of Bt needs.
// Shapes: dy [T, d], pack Bt, z, upstream, dz, weighted [T, W], gates, dgates [T, 2].
// Tiling: dl is a sum over a token's whole row, so one block computes whole rows, 48 F columns at a
//     time.  Each thread sums the eight columns of its pieces, then one thread per row sums the
//     pieces, always in the same order.
// Bytes: dy once per 192 columns (T d), the k rows of Bt once per tile (from L2), z and upstream
//     read, dz and weighted written (T W each).
template <class E, int F>
__global__ void __launch_bounds__(384)
shrink_backward(const E* dy, const E* matrix, int d, Segments segments, Ranks ranks, bool live,
                int width, int height, float scale, const E* z, const float* gates,
                const E* upstream, E* dz, E* weighted, float* dgates) {
    constexpr int PIECES = SHRINK_PIECES<F>;
    const Tile tile = find_tile(segments, blockIdx.x, height);
    if (tile.rows == 0) return;
    const int k = ranks.universal + ranks.task;
    const int mine = threadIdx.x;  // the row that this thread sums, if there is one
    float e_U = 0.0f, e_n = 0.0f;
    for (int first = 0; first < width; first += SHRINK_COLUMNS<F>) {
        float* sums = shrink_products<E, F>(dy, matrix, d, tile, ranks, false, first, height);
        float* parts = sums + height * SHRINK_STRIDE<F>;  // [height, PIECES, 2]
        for (int i = threadIdx.x; i < tile.rows * PIECES; i += blockDim.x) {
            const int row = i / PIECES, column = i % PIECES * 8, token = tile.start + row;
            float part_U = 0.0f, part_n = 0.0f, code[8] = {}, gradient[8] = {}, product[8];
            const int64_t at = static_cast<int64_t>(token) * width + first + column;
            if (first + column >= width) {
                parts[2 * i] = parts[2 * i + 1] = 0.0f;
                continue;
            }
            load_eight(code, z + at);
            if (upstream) load_eight(gradient, upstream + at);
            const float g1 = gates[2 * token], g2 = gates[2 * token + 1];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const int c = first + column + j;
                const bool universal = c < ranks.universal;
                const float q = scale * sums[row * SHRINK_STRIDE<F> + column + j];
                const float g = universal ? g1 : g2;
                (universal ? part_U : part_n) += q * code[j];
                gradient[j] = c < k ? g * q + gradient[j] : 0.0f;
                product[j] = scale * g * code[j];
            }
            parts[2 * i] = part_U, parts[2 * i + 1] = part_n;
            store_eight(dz + at, gradient);
            store_eight(weighted + at, product);
        }
        __syncthreads();
        if (mine < tile.rows)
            for (int piece = 0; piece < PIECES; ++piece) {
                e_U += parts[2 * (mine * PIECES + piece)];
                e_n += parts[2 * (mine * PIECES + piece) + 1];
            }
        __syncthreads();  // the next columns' slabs overwrite `sums` and `parts`
    }
    if (mine >= tile.rows) return;
    const int token = tile.start + mine;
    const float g1 = gates[2 * token], g2 = gates[2 * token + 1];
    if (live) dz[static_cast<int64_t>(token) * width + k] = from_float<E>(g1 * g2 * (e_U - e_n));
    if (dgates) dgates[2 * token] = e_U, dgates[2 * token + 1] = e_n;
}

// ----------------------------------------------------------------------------------------- expand

constexpr int EXPAND_GROUPS = 4, EXPAND_F = 2;  // warps side by side, squares in each
constexpr int EXPAND_COLUMNS = 16 * EXPAND_F * EXPAND_GROUPS;  // 128
template <class E> constexpr int EXPAND_STRIDE = EXPAND_COLUMNS + PADDING_BYTES / int(sizeof(E));
constexpr int EXPAND_SUM_STRIDE = EXPAND_COLUMNS + 4;

template <class E>
int expand_bytes(int height) {
    const int stage = height * SLAB_STRIDE<E> + DEPTH<E> * EXPAND_STRIDE<E>;
    const int stages = STAGES * stage * int(sizeof(E));
    const int epilogue = height * EXPAND_SUM_STRIDE * int(sizeof(float));
    return stages > epilogue ? stages : epilogue;
}

// expand: y_t (+)= sum_c w_t(c) codes_t(c) pack_row(c), with w_t = s g1 on the universal
//     columns and s g2 on the task's (forward), or 1 where `gates` is null (backward, on dz).
// Shapes: codes [T, W], gates [T, 2], pack [.., d], y [T, d].
// Tiling: block (i, j) computes columns 128 j ... of the i-th tile.  The inner dimension is short
//     (k = 171 at R = 128: three slabs in bf16, all in flight at once).  The gate costs no pass of
//     its own: each thread weighs the pieces that it has copied itself, before the barrier.
// Bytes: T W codes per column block (from L2), the k rows of the pack once per tile (from L2), y
//     read and written (2 T d), or only written where it does not `accumulate`.
template <class E>
__global__ void __launch_bounds__(512)
expand(const E* codes, const float* gates, const E* matrix, int d, Segments segments, Ranks ranks,
       bool gate_row, int width, float scale, bool accumulate, int height, E* y) {
    constexpr int EACH = 16 / sizeof(E), PIECES = DEPTH<E> / EACH;
    SHARED_MEMORY(memory);
    E* stages = reinterpret_cast<E*>(memory);
    const int stage_size = height * SLAB_STRIDE<E> + DEPTH<E> * EXPAND_STRIDE<E>;
    const Tile tile = find_tile(segments, blockIdx.x, height);
    if (tile.rows == 0) return;
    const int first = blockIdx.y * EXPAND_COLUMNS, warp = threadIdx.x / 32;
    const int top = warp / EXPAND_GROUPS * 16, left = warp % EXPAND_GROUPS * 16 * EXPAND_F;
    WarpTile<E, EXPAND_F> product;
    product.clear();
    auto load = [&](int slab, int stage) {
        E* to = stages + stage * stage_size;
        const int inner = slab * DEPTH<E>;
        copy_rows<DEPTH<E>>(to, SLAB_STRIDE<E>, height, codes, width, inner, width, [&](int i) {
            return i < tile.rows ? tile.start + i : -1; });
        copy_rows<EXPAND_COLUMNS>(to + height * SLAB_STRIDE<E>, EXPAND_STRIDE<E>, DEPTH<E>, matrix,
                                  d, first, d, [&](int i) {
            return pack_row(inner + i, tile.task, ranks, gate_row); });
    };
    auto weigh = [&](int slab, int stage) {
        if (!gates) return;
        for (int i = threadIdx.x; i < tile.rows * PIECES; i += blockDim.x) {  // as in copy_rows
            const int row = i / PIECES, column = i % PIECES * EACH;
            E* code = stages + stage * stage_size + row * SLAB_STRIDE<E> + column;
            const float g1 = gates[2 * (tile.start + row)], g2 = gates[2 * (tile.start + row) + 1];
#pragma unroll
            for (int j = 0; j < EACH; ++j) {
                const bool universal = slab * DEPTH<E> + column + j < ranks.universal;
                code[j] = from_float<E>(scale * (universal ? g1 : g2) * to_float(code[j]));
            }
        }
    };
    auto multiply = [&](int stage) {
        const E* from = stages + stage * stage_size;
        product.template multiply<true>(from + top * SLAB_STRIDE<E>, SLAB_STRIDE<E>,
                                        from + height * SLAB_STRIDE<E> + left, EXPAND_STRIDE<E>,
                                        DEPTH<E>);
    };
    const int columns = ranks.universal + ranks.task + gate_row;
    pipeline((columns + DEPTH<E> - 1) / DEPTH<E>, load, weigh, multiply);
    float* sums = reinterpret_cast<float*>(memory);
    product.store(sums + top * EXPAND_SUM_STRIDE + left, EXPAND_SUM_STRIDE);
    __syncthreads();
    for (int i = threadIdx.x; i < tile.rows * (EXPAND_COLUMNS / 8); i += blockDim.x) {
        const int row = i / (EXPAND_COLUMNS / 8), column = i % (EXPAND_COLUMNS / 8) * 8;
        if (first + column >= d) continue;
        E* to = y + static_cast<int64_t>(tile.start + row) * d + first + column;
        float value[8] = {};
        if (accumulate) load_eight(value, to);
#pragma unroll
        for (int j = 0; j < 8; ++j) value[j] += sums[row * EXPAND_SUM_STRIDE + column + j];
        store_eight(to, value);
    }
}

// -------------------------------------------------------------------------------------- launchers

// Tokens per tile: tall tiles read the packs less often, low ones give more blocks.  The steps aim
// at one or two blocks for each of a large GPU's 132 multiprocessors.
inline int tile_height(int tokens) { return tokens <= 2048 ? 16 : tokens <= 8192 ? 32 : 64; }

// No more tiles than this can be in the call's segments, whose lengths the host does not know.
inline int tile_count(const Call& call, int height) {
    return call.tokens / height + call.segment_count;
}

inline Segments segments_of(const Call& call) { return {call.segments, call.segment_count}; }

// The tile height whose slabs fit this GPU's shared memory (99 KiB on some, 227 on others).
template <class Bytes>
int fitting_height(int tokens, Bytes bytes) {
    int height = tile_height(tokens);
    while (height > 16 && bytes(height) > shared_limit()) height /= 2;
    return height;
}

template <class E, int F>
const char* run_shrink(const Call& call, const E* x, const E* A, int d, bool gate_row, E* z,
                       float* gates) {
    const int height = fitting_height(call.tokens, shrink_bytes<E, F>);
    const int blocks = (call.width() + SHRINK_COLUMNS<F> - 1) / SHRINK_COLUMNS<F>;
    return launch(shrink<E, F>, dim3(tile_count(call, height), blocks),
                  height / 16 * SHRINK_GROUPS * 32, shrink_bytes<E, F>(height), call.stream, x, A,
                  d, segments_of(call), call.ranks, gate_row, call.width(), height, z, gates);
}

template <class E>
const char* all_shrink(const Call& call, const E* x, const E* A, int d, bool gate_row, E* z,
                       float* gates) {
    const bool few = call.tokens <= 2048;  // then narrow columns: more blocks
    const auto run = few || call.width() <= 48 ? run_shrink<E, 1>
                     : call.width() <= 96      ? run_shrink<E, 2> : run_shrink<E, 4>;
    return run(call, x, A, d, gate_row, z, gates);
}

template <class E, int F>
const char* run_shrink_backward(const Call& call, const E* dy, const E* Bt, int d, const E* z,
                                const float* gates, const E* upstream, E* dz, E* weighted,
                                float* dgates) {
    const int height = fitting_height(call.tokens, shrink_bytes<E, F>);
    return launch(shrink_backward<E, F>, dim3(tile_count(call, height)),
                  height / 16 * SHRINK_GROUPS * 32, shrink_bytes<E, F>(height), call.stream, dy, Bt,
                  d, segments_of(call), call.ranks, call.live, call.width(), height, call.scale, z,
                  gates, upstream, dz, weighted, dgates);
}

template <class E>
const char* all_shrink_backward(const Call& call, const E* dy, const E* Bt, int d, const E* z,
                                const float* gates, const E* upstream, E* dz, E* weighted,
                                float* dgates) {
    const auto run = call.width() <= 48   ? run_shrink_backward<E, 1>
                     : call.width() <= 96 ? run_shrink_backward<E, 2> : run_shrink_backward<E, 4>;
    return run(call, dy, Bt, d, z, gates, upstream, dz, weighted, dgates);
}

template <class E>
const char* all_expand(const Call& call, const E* codes, const float* gates, const E* matrix, int d,
                       bool gate_row, bool accumulate, E* y) {
    const int height = fitting_height(call.tokens, expand_bytes<E>);
    const dim3 grid(tile_count(call, height), (d + EXPAND_COLUMNS - 1) / EXPAND_COLUMNS);
    return launch(expand<E>, grid, height / 16 * EXPAND_GROUPS * 32, expand_bytes<E>(height),
                  call.stream, codes, gates, matrix, d, segments_of(call), call.ranks, gate_row,
                  call.width(), call.scale, accumulate, height, y);
}

template <class E>
const char* all_pack(const Call& call, const PackJob* jobs, int count) {
    for (int done = 0; done < count; done += MAX_JOBS) {
        PackJobs group;
        const int size = count - done < MAX_JOBS ? count - done : MAX_JOBS;
        int squares = 0;
        for (int i = 0; i < size; ++i) {
            const PackJob& job = group.job[i] = jobs[done + i];
            const int rows = job.kind == DIFFERENCE ? 1 : job.rows;
            const int needed = job.count * ((rows + 31) / 32) * ((job.columns + 31) / 32);
            squares = needed > squares ? needed : squares;
        }
        if (squares == 0) continue;
        const char* error =
            launch(pack<E>, dim3(squares, size), 256, 32 * 33 * 4, call.stream, group);
        if (error) return error;
    }
    return nullptr;
}

// Calls run with a null pointer of the element type that the call asks for.
template <class Run>
const char* with_type(const Call& call, Run run) {
    return call.bf16 ? run(static_cast<bf16*>(nullptr)) : run(static_cast<float*>(nullptr));
}

extern "C" {
const char* clorae_pack(const Call& call, const PackJob* jobs, int count) {
    return call.bf16 ? all_pack<bf16>(call, jobs, count) : all_pack<float>(call, jobs, count);
}

const char* clorae_shrink(const Call& call, const void* x, const void* A, int d, bool gate_row,
                          void* z, float* gates) {
    return with_type(call, [&](auto* type) {
        using E = std::remove_pointer_t<decltype(type)>;
        return all_shrink<E>(call, static_cast<const E*>(x), static_cast<const E*>(A), d, gate_row,
                             static_cast<E*>(z), gates);
    });
}

const char* clorae_shrink_backward(const Call& call, const void* dy, const void* Bt, int d,
                                   const void* z, const float* gates, const void* upstream,
                                   void* dz, void* weighted, float* dgates) {
    return with_type(call, [&](auto* type) {
        using E = std::remove_pointer_t<decltype(type)>;
        return all_shrink_backward<E>(call, static_cast<const E*>(dy), static_cast<const E*>(Bt), d,
                                      static_cast<const E*>(z), gates,
                                      static_cast<const E*>(upstream), static_cast<E*>(dz),
                                      static_cast<E*>(weighted), dgates);
    });
}

const char* clorae_expand(const Call& call, const void* codes, const float* gates,
                          const void* pack, int d, bool gate_row, bool accumulate, void* y) {
    return with_type(call, [&](auto* type) {
        using E = std::remove_pointer_t<decltype(type)>;
        return all_expand<E>(call, static_cast<const E*>(codes), gates, static_cast<const E*>(pack),
                             d, gate_row, accumulate, static_cast<E*>(y));
    });
}
}

#endif  // kernels

#ifndef __CUDACC__
// ------------------------------------------------------------------------------------ the binding
//
// Operators of the library `clorae_kernels` that check every argument, make its GPU the current
// one and launch.  Torch's stable C++ interface: it compiles in seconds, not in a minute.
// Outputs are arguments, allocated by fast/cuda.py.  segments [n, 3] in int32: task, start, stop of
// each run of tokens, on the GPU and therefore not looked at here: cuda.py, which makes them,
// sees that they cover all tokens in order and have tasks below N.  ranks: R, r, N.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#ifdef CLORAE_EMULATOR
#define CLORAE_DEVICE CPU
#define CLORAE_LIBRARY clorae_emulator
#else
#define CLORAE_DEVICE CUDA
#define CLORAE_LIBRARY clorae_kernels
#endif

namespace binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Integers = std::vector<int64_t>;

std::string shape_text(const Integers& sizes) {
    std::string text = "[";
    for (int64_t size : sizes)
        text += (text.size() > 1 ? ", " : "") + (size < 0 ? "any" : std::to_string(size));
    return text + "]";
}

// What all tensors of one call must agree with, and the sentence for the one that does not.
struct Checker {
    const char* kernel;
    ScalarType type;  // E
    int device;

    Checker(const char* kernel, const Tensor& x)
        : kernel(kernel), type(x.scalar_type()), device(x.get_device_index()) {
        STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Float, kernel,
                        ": expected bfloat16 or float32, got ", torch::headeronly::toString(type),
                        "; convert the input, or use --impl fast");
    }

    // Raises unless `tensor` is a contiguous [sizes] (-1: any) of this type, on this device and
    // aligned.
    void operator()(const Tensor& tensor, const char* name, const Integers& sizes,
                    ScalarType wanted, int alignment = 16) const {
        const Integers got(tensor.sizes().begin(), tensor.sizes().end());
        bool fits = got.size() == sizes.size();
        for (size_t i = 0; fits && i < sizes.size(); ++i) fits = sizes[i] < 0 || sizes[i] == got[i];
        STD_TORCH_CHECK(fits, kernel, ": expected ", name, " of shape ", shape_text(sizes),
                        ", got ", shape_text(got));
        STD_TORCH_CHECK(tensor.scalar_type() == wanted, kernel, ": expected ", name, " in ",
                        torch::headeronly::toString(wanted), ", got ",
                        torch::headeronly::toString(tensor.scalar_type()));
        STD_TORCH_CHECK(tensor.get_device_index() == device, kernel, ": expected ", name,
                        " on device ", device, ", got device ", tensor.get_device_index());
        STD_TORCH_CHECK(tensor.is_contiguous(), kernel, ": expected ", name,
                        " to be contiguous; call .contiguous()");
        STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % alignment == 0,
                        kernel, ": expected ", name, " to start at a multiple of ", alignment,
                        " bytes; clone it");
    }
};

Ranks read_ranks(const char* kernel, const Integers& ranks) {
    STD_TORCH_CHECK(ranks.size() == 3 && ranks[0] >= 0 && ranks[1] >= 0 && ranks[2] >= 0 &&
                        ranks[0] + ranks[1] * ranks[2] < 1 << 20,
                    kernel, ": expected ranks (R, r, N), none negative, got ", shape_text(ranks));
    return {int(ranks[0]), int(ranks[1]), int(ranks[2])};
}

int rows_of(Ranks ranks, bool gate) { return ranks.universal + ranks.tasks * ranks.task + gate; }

// The call for T tokens in these segments.
Call call_of(const Checker& check, const Tensor& segments, Ranks ranks, bool live, double scale,
             int64_t tokens, int64_t stream) {
    check(segments, "segments", {-1, 3}, ScalarType::Int, 4);
    const int64_t count = segments.size(0);
    STD_TORCH_CHECK(tokens < int64_t(1) << 31, check.kernel, ": expected fewer than 2^31 tokens, ",
                    "got ", tokens);
    return {check.type != ScalarType::Float, live, ranks, float(scale), int(tokens),
            static_cast<const Segment*>(segments.const_data_ptr()), int(count),
            reinterpret_cast<void*>(stream)};
}

void check_width(const char* kernel, int64_t d) {
    STD_TORCH_CHECK(d > 0 && d % 8 == 0 && d < 1 << 24, kernel,
                    ": expected a width that is a multiple of 8, got ", d);
}

// The launch itself: on the tensors' own GPU, on the stream that fast/cuda.py passes.
template <class Launch>
void run(const Checker& check, Launch launch) {
#ifndef CLORAE_EMULATOR
    torch::stable::accelerator::DeviceGuard guard(check.device);
#endif
    const char* error = launch();
    STD_TORCH_CHECK(!error, check.kernel, ": the launch failed: ", error ? error : "");
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

const void* pointer_or_null(const std::optional<Tensor>& tensor) {
    return tensor ? tensor->const_data_ptr() : nullptr;
}

void pack(Tensor A_U, Tensor A_T, Tensor B_U, Tensor B_T, Tensor W_g, Tensor A, Tensor Bt,
          int64_t stream) {
    const Checker check("pack", A);
    const int64_t R = A_U.size(0), N = A_T.size(0), r = A_T.size(1), d_in = A.size(1);
    const int64_t d_out = Bt.size(1), gate = W_g.size(0) / 2;
    check_width("pack", d_in);
    check_width("pack", d_out);
    check(A_U, "A_U", {-1, d_in}, ScalarType::Float, 4);
    check(A_T, "A_T", {-1, -1, d_in}, ScalarType::Float, 4);
    check(B_U, "B_U", {d_out, R}, ScalarType::Float, 4);
    check(B_T, "B_T", {N, d_out, r}, ScalarType::Float, 4);
    check(W_g, "W_g", {2 * gate, d_in}, ScalarType::Float, 4);
    check(A, "A", {R + N * r + gate, d_in}, check.type);
    check(Bt, "Bt", {R + N * r, d_out}, check.type);
    char* const to_A = static_cast<char*>(A.mutable_data_ptr());
    char* const to_Bt = static_cast<char*>(Bt.mutable_data_ptr());
    const int64_t size = check.type == ScalarType::Float ? 4 : 2;
    auto job = [](const Tensor& from, void* to, int64_t count, int64_t rows, int64_t columns,
                  PackKind kind) {
        return PackJob{floats(from), to, int(count), int(rows), int(columns), kind};
    };
    const PackJob jobs[] = {
        job(A_U, to_A, 1, R, d_in, COPY),
        job(A_T, to_A + R * d_in * size, 1, N * r, d_in, COPY),
        job(W_g, to_A + (R + N * r) * d_in * size, gate, 2, d_in, DIFFERENCE),
        job(B_U, to_Bt, 1, d_out, R, TRANSPOSE),
        job(B_T, to_Bt + R * d_out * size, N, d_out, r, TRANSPOSE),
    };
    const Call call{size == 2, false, {}, 1.0f, 0, nullptr, 0, reinterpret_cast<void*>(stream)};
    run(check, [&] { return clorae_pack(call, jobs, 5); });
}

void shrink(Tensor x, Tensor A, Tensor segments, Integers ranks, bool live, Tensor z,
            Tensor gates, int64_t stream) {
    const Checker check("shrink", x);
    const Ranks layout = read_ranks("shrink", ranks);
    check(x, "x", {-1, -1}, check.type);
    const int64_t T = x.size(0), d = x.size(1);
    check_width("shrink", d);
    const bool gate_row = live && A.size(0) == rows_of(layout, true);
    check(A, "A", {rows_of(layout, gate_row), d}, check.type);
    check(z, "z", {T, code_width(layout, live)}, check.type);
    check(gates, "gates", {T, 2}, ScalarType::Float);
    const Call call = call_of(check, segments, layout, live, 1.0, T, stream);
    if (T == 0) return;
    run(check, [&] {
        return clorae_shrink(call, x.const_data_ptr(), A.const_data_ptr(), int(d), gate_row,
                             z.mutable_data_ptr(), floats(gates));
    });
}

void shrink_backward(Tensor dy, Tensor Bt, Tensor segments, Integers ranks, bool live,
                     double scale, Tensor z, Tensor gates, std::optional<Tensor> upstream,
                     Tensor dz, Tensor weighted, Tensor dgates, int64_t stream) {
    const Checker check("shrink_backward", dy);
    const Ranks layout = read_ranks("shrink_backward", ranks);
    check(dy, "dy", {-1, -1}, check.type);
    const int64_t T = dy.size(0), d = dy.size(1), width = code_width(layout, live);
    check_width("shrink_backward", d);
    check(Bt, "Bt", {rows_of(layout, false), d}, check.type);
    check(z, "z", {T, width}, check.type);
    check(gates, "gates", {T, 2}, ScalarType::Float);
    if (upstream) check(*upstream, "the gradient of z", {T, width}, check.type);
    check(dz, "dz", {T, width}, check.type);
    check(weighted, "weighted", {T, width}, check.type);
    check(dgates, "dgates", {T, 2}, ScalarType::Float);
    const Call call = call_of(check, segments, layout, live, scale, T, stream);
    if (T == 0) return;
    run(check, [&] {
        return clorae_shrink_backward(call, dy.const_data_ptr(), Bt.const_data_ptr(), int(d),
                                      z.const_data_ptr(), floats(gates), pointer_or_null(upstream),
                                      dz.mutable_data_ptr(), weighted.mutable_data_ptr(),
                                      floats(dgates));
    });
}

void expand(Tensor codes, std::optional<Tensor> gates, Tensor matrix, Tensor segments,
            Integers ranks, bool live, double scale, bool accumulate, Tensor y, int64_t stream) {
    const Checker check("expand", codes);
    const Ranks layout = read_ranks("expand", ranks);
    check(y, "y", {-1, -1}, check.type);
    const int64_t T = y.size(0), d = y.size(1), rows = matrix.size(0);
    check_width("expand", d);
    check(codes, "codes", {T, code_width(layout, live)}, check.type);
    if (gates) check(*gates, "gates", {T, 2}, ScalarType::Float);
    const bool gate_row = live && rows == rows_of(layout, true);
    check(matrix, "the pack", {rows_of(layout, gate_row), d}, check.type);
    const Call call = call_of(check, segments, layout, live, scale, T, stream);
    if (T == 0) return;
    run(check, [&] {
        return clorae_expand(call, codes.const_data_ptr(),
                             static_cast<const float*>(pointer_or_null(gates)),
                             matrix.const_data_ptr(), int(d), gate_row, accumulate,
                             y.mutable_data_ptr());
    });
}

STABLE_TORCH_LIBRARY(CLORAE_LIBRARY, library) {
    library.def("pack(Tensor A_U, Tensor A_T, Tensor B_U, Tensor B_T, Tensor W_g, Tensor(a!) A, "
                "Tensor(b!) Bt, int stream) -> ()");
    library.def("shrink(Tensor x, Tensor A, Tensor segments, int[] ranks, bool live, Tensor(a!) z, "
                "Tensor(b!) gates, int stream) -> ()");
    library.def("shrink_backward(Tensor dy, Tensor Bt, Tensor segments, int[] ranks, bool live, "
                "float scale, Tensor z, Tensor gates, Tensor? upstream, Tensor(a!) dz, "
                "Tensor(b!) weighted, Tensor(c!) dgates, int stream) -> ()");
    library.def("expand(Tensor codes, Tensor? gates, Tensor matrix, Tensor segments, int[] ranks, "
                "bool live, float scale, bool accumulate, Tensor(a!) y, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(CLORAE_LIBRARY, CLORAE_DEVICE, library) {
    library.impl("pack", TORCH_BOX(&pack));
    library.impl("shrink", TORCH_BOX(&shrink));
    library.impl("shrink_backward", TORCH_BOX(&shrink_backward));
    library.impl("expand", TORCH_BOX(&expand));
}

}  // namespace binding

#endif  // binding
