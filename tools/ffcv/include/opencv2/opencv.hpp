// What FFCV's C++ uses of OpenCV, and no more: a view of an 8-bit RGB image, and cv::resize with INTER_AREA.
//
// Shrinking takes the average of the covered pixels, weighted by how much of each is covered. Where a side grows,
// OpenCV interpolates both sides linearly from the pixel borders; so does this.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

enum { CV_8UC3 = 16 };

namespace cv {

enum { INTER_AREA = 3 };

struct Size {
    int width, height;
};

struct Mat {
    int rows, cols;
    uint8_t *data;
    size_t line;  // bytes from a row to the next

    Mat(int rows, int cols, int, uint8_t *data) : rows(rows), cols(cols), data(data), line(3 * size_t(cols)) {}
    Mat rowRange(int start, int end) const {
        Mat part(*this);
        part.data += start * line;
        part.rows = end - start;
        return part;
    }
    Mat colRange(int start, int end) const {
        Mat part(*this);
        part.data += 3 * size_t(start);
        part.cols = end - start;
        return part;
    }
    Size size() const { return {cols, rows}; }
};

// For each of `to` places along a side of `from` pixels: which pixels it is made of, and their weights.
using Taps = std::vector<std::vector<std::pair<int, double>>>;

inline Taps taps(int from, int to, bool shrink) {
    const double scale = double(from) / to;
    Taps all(to);
    for (int place = 0; place < to; ++place) {
        if (shrink) {
            const double start = place * scale, end = std::min(start + scale, double(from));
            for (int pixel = int(start); pixel < end; ++pixel) {
                const double covered = std::min(end, pixel + 1.0) - std::max(start, double(pixel));
                if (covered > 1e-9 * scale) all[place].emplace_back(pixel, covered / (end - start));
            }
        } else {
            const int pixel = int(std::floor(place * scale));
            const double past = (place + 1) - (pixel + 1) / scale;
            const double weight = past <= 0 ? 0 : past - std::floor(past);
            all[place].emplace_back(pixel, 1 - weight);
            all[place].emplace_back(std::min(pixel + 1, from - 1), weight);
        }
    }
    return all;
}

inline void resize(const Mat &source, const Mat &target, Size, double, double, int) {
    const bool shrink = source.cols >= target.cols && source.rows >= target.rows;
    const Taps down = taps(source.rows, target.rows, shrink), across = taps(source.cols, target.cols, shrink);
    std::vector<double> row(3 * size_t(source.cols));
    for (int y = 0; y < target.rows; ++y) {
        std::fill(row.begin(), row.end(), 0);
        for (const auto &[pixel, weight] : down[y])
            for (size_t i = 0; i < row.size(); ++i) row[i] += weight * source.data[pixel * source.line + i];
        for (int x = 0; x < target.cols; ++x)
            for (int channel = 0; channel < 3; ++channel) {
                double sum = 0;
                for (const auto &[pixel, weight] : across[x]) sum += weight * row[3 * size_t(pixel) + channel];
                target.data[y * target.line + 3 * size_t(x) + channel] =
                    uint8_t(std::min(255.0, std::max(0.0, std::nearbyint(sum))));
            }
    }
}

}  // namespace cv
