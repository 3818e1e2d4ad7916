// Root-mean-square normalization of rows: `y = w x i`, `i = 1 / sqrt(mean(x^2) + eps)`.
//
// Backward, with `g = w dy`: `i (g - x i^2 mean(g x))`, added to `dx` where `adds` is 1; the weight is frozen.
//
// A row of up to 1024 elements is a warp's, so grid = ceil(rows / 8); a wider one is a block's, so grid = rows. A thread
// holds its share of the row in registers: all of it up to 8192 elements, beyond that the rest is read again from the cache.
// Bytes an element: forward 4, forward_residual 8, backward 8, or 6 where it does not add; the weight comes from the cache.
//
// Source: arXiv:1910.07467.

#include "bf16_vector.cuh"

namespace {

constexpr unsigned THREADS = 256;
constexpr unsigned WARP_ROW = 1024;

// Vectors of a row that a thread holds.
constexpr unsigned HELD = 4;

// This thread's share of a row in memory: its first HELD vectors, and where the row lies.
template <typename Vector>
struct Held {
    const bf16* row;
    Vector vectors[HELD];

    // Vector k, which starts at element i; from number HELD on it is read again.
    __device__ __forceinline__ Vector at(unsigned i, unsigned k) const {
        return k < HELD ? vectors[k] : Vector::load(row + i);
    }
};

// How a row of `d` elements is dealt out, vector by vector, to the TEAM threads that share it: a warp or the block.
template <unsigned TEAM, typename Element>
struct Share {
    using Vector = Element;
    static constexpr unsigned STRIDE = TEAM * Vector::WIDTH;
    unsigned d;

    __device__ __forceinline__ unsigned first() const { return threadIdx.x % TEAM * Vector::WIDTH; }

    // Starts all its loads before the first is waited for.
    __device__ __forceinline__ Held<Vector> load(const bf16* row) const {
        Held<Vector> held = {row, {}};
#pragma unroll
        for (unsigned k = 0; k < HELD; k++) {
            const unsigned i = first() + k * STRIDE;
            if (i < d) {
                held.vectors[k] = Vector::load(row + i);
            }
        }
        return held;
    }

    // Gives `body` the first element of each vector of this thread, and the vector's number, HELD for all from HELD on.
    template <typename Body>
    __device__ __forceinline__ void for_each_vector(Body body) const {
#pragma unroll
        for (unsigned k = 0; k < HELD; k++) {
            const unsigned i = first() + k * STRIDE;
            if (i < d) {
                body(i, k);
            }
        }
#pragma unroll 1
        for (uint64_t i = first() + HELD * STRIDE; i < d; i += STRIDE) {
            body(static_cast<unsigned>(i), HELD);
        }
    }

    // The mean over the row of what the threads have summed.
    __device__ __forceinline__ float mean(float sum) const {
        return (TEAM == WARP_LANES ? warp_sum(sum) : block_sum<THREADS>(sum)) / static_cast<float>(d);
    }
};

// Gives `body` this thread's share of a row, in the kind that fits the row, and where the row starts.
template <typename Body>
__device__ __forceinline__ void with_share_of_row(unsigned rows, unsigned d, bool aligned, Body body) {
    const bool vectorized = aligned && d % 8 == 0;
    const bool is_of_warp = d <= WARP_ROW;
    const uint64_t block = blockIdx.x;
    const uint64_t row = is_of_warp ? block * (THREADS / WARP_LANES) + threadIdx.x / WARP_LANES : block;
    if (row >= rows) {
        return;
    }
    if (is_of_warp) {
        if (vectorized) {
            body(Share<WARP_LANES, Bf16Vector<8>>{d}, row * d);
        } else {
            body(Share<WARP_LANES, Bf16Vector<1>>{d}, row * d);
        }
    } else {
        if (vectorized) {
            body(Share<THREADS, Bf16Vector<8>>{d}, row * d);
        } else {
            body(Share<THREADS, Bf16Vector<1>>{d}, row * d);
        }
    }
}

template <typename Vector>
__device__ __forceinline__ float sum_of_squares(Vector vector) {
    float values[Vector::WIDTH];
    vector.widen(values);
    float sum = 0.0f;
#pragma unroll
    for (unsigned e = 0; e < Vector::WIDTH; e++) {
        sum += values[e] * values[e];
    }
    return sum;
}

__device__ __forceinline__ float inverse_rms(float mean_square, float eps) { return 1.0f / sqrtf(mean_square + eps); }

// y = weight x scale.
template <typename Share, typename Held>
__device__ __forceinline__ void write_normalized(const Share& share, const Held& x, float scale,
                                                 const float* __restrict__ weight, bf16* y) {
    using Vector = typename Share::Vector;
    share.for_each_vector([&](unsigned i, unsigned k) {
        float values[Vector::WIDTH];
        float w[Vector::WIDTH];
        x.at(i, k).widen(values);
        load_floats(weight + i, w);
#pragma unroll
        for (unsigned e = 0; e < Vector::WIDTH; e++) {
            values[e] = w[e] * (values[e] * scale);
        }
        Vector::round(values).store(y + i);
    });
}

}  // namespace

KERNEL(256, rms_norm_forward_bf16)
(const bf16* __restrict__ x, const float* __restrict__ weight, unsigned rows, unsigned d, float eps, bf16* __restrict__ y) {
    with_share_of_row(rows, d, are_aligned(x, weight, y), [=](auto share, uint64_t start) {
        const auto held = share.load(x + start);
        float squares = 0.0f;
        share.for_each_vector([&](unsigned i, unsigned k) { squares += sum_of_squares(held.at(i, k)); });
        const float scale = inverse_rms(share.mean(squares), eps);
        write_normalized(share, held, scale, weight, y + start);
    });
}

// sum = x + branch, y = norm(sum as it is stored); `sum` may be `branch`.
KERNEL(256, rms_norm_forward_residual_bf16)
(const bf16* x, const bf16* branch, const float* __restrict__ weight, unsigned rows, unsigned d, float eps, bf16* sum,
 bf16* y) {
    with_share_of_row(rows, d, are_aligned(x, branch, weight, sum, y), [=](auto share, uint64_t start) {
        using Vector = typename decltype(share)::Vector;
        const auto held_x = share.load(x + start);
        const auto held_branch = share.load(branch + start);
        auto held_sum = held_x;
        held_sum.row = sum + start;
        float squares = 0.0f;
        share.for_each_vector([&](unsigned i, unsigned k) {
            float values[Vector::WIDTH];
            float branch_values[Vector::WIDTH];
            held_x.at(i, k).widen(values);
            held_branch.at(i, k).widen(branch_values);
#pragma unroll
            for (unsigned e = 0; e < Vector::WIDTH; e++) {
                values[e] += branch_values[e];
            }
            const Vector rounded = Vector::round(values);
            rounded.store(sum + start + i);
            if (k < HELD) {
                held_sum.vectors[k] = rounded;
            }
            squares += sum_of_squares(rounded);
        });
        const float scale = inverse_rms(share.mean(squares), eps);
        write_normalized(share, held_sum, scale, weight, y + start);
    });
}

KERNEL(256, rms_norm_backward_bf16)
(const bf16* __restrict__ dy, const bf16* __restrict__ x, const float* __restrict__ weight, unsigned rows, unsigned d,
 float eps, unsigned adds, bf16* __restrict__ dx) {
    with_share_of_row(rows, d, are_aligned(dy, x, weight, dx), [=](auto share, uint64_t start) {
        using Vector = typename decltype(share)::Vector;
        constexpr unsigned WIDTH = Vector::WIDTH;
        const auto held_dy = share.load(dy + start);
        const auto held_x = share.load(x + start);
        const auto held_dx = adds ? share.load(dx + start) : Held<Vector>{dx + start, {}};
        float squares = 0.0f;
        float products = 0.0f;
        share.for_each_vector([&](unsigned i, unsigned k) {
            float dy_values[WIDTH];
            float x_values[WIDTH];
            float w[WIDTH];
            held_dy.at(i, k).widen(dy_values);
            held_x.at(i, k).widen(x_values);
            load_floats(weight + i, w);
#pragma unroll
            for (unsigned e = 0; e < WIDTH; e++) {
                squares += x_values[e] * x_values[e];
                products += w[e] * dy_values[e] * x_values[e];
            }
        });
        const float scale = inverse_rms(share.mean(squares), eps);
        const float projection = share.mean(products) * scale * scale;
        share.for_each_vector([&](unsigned i, unsigned k) {
            float dy_values[WIDTH];
            float x_values[WIDTH];
            float sum[WIDTH] = {};
            float w[WIDTH];
            held_dy.at(i, k).widen(dy_values);
            held_x.at(i, k).widen(x_values);
            if (adds) {
                held_dx.at(i, k).widen(sum);
            }
            load_floats(weight + i, w);
#pragma unroll
            for (unsigned e = 0; e < WIDTH; e++) {
                sum[e] += scale * (w[e] * dy_values[e] - x_values[e] * projection);
            }
            Vector::round(sum).store(dx + start + i);
        });
    });
}
