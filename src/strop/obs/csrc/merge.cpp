// Files -> lines in order. Each rank of each attempt is a stream: its structured segments one after the
// other, with its raw lines put in by the marks. A heap takes the least (key, rank, attempt) of all streams.
//
// Memory is a buffer a stream that has been opened, and a stream is opened when the merge comes near its
// attempt; so later attempts cost nothing yet, and finished streams nothing any more. Descriptors are kept
// while there are any, and beyond that a file is opened for each refill.
#include "merge.hpp"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <memory>
#include <unistd.h>

namespace {

constexpr int64_t MAX_LINE = 256 << 10;
constexpr size_t OUT_BYTES = 1 << 20;
constexpr int64_t LINES_PER_CALL = 200000;
constexpr int64_t LAST_TIME = 253402300799999999;  // of the year 9999
constexpr int64_t CLOCK_BACK_US = 100000;

int64_t free_descriptors;

// The lines of consecutive segments.
class Lines {
  public:
    Lines(strop_log_segment* segments, int64_t num, int64_t buffer_bytes, int64_t* counts)
        : segments_(segments), num_(num), nominal_(buffer_bytes), counts_(counts) {}
    ~Lines() { close_file(); free(buffer_); }

    // `line` is valid until the next call. `whole`: it had its newline. `at`, `offset`: where it begins.
    bool next(string_view* line, bool* whole, int64_t* at, int64_t* offset) {
        while (at_ < num_) {
            const char* start = buffer_ + scanned_;
            auto* newline = end_ > scanned_ ? (const char*)memchr(start, '\n', end_ - scanned_) : nullptr;
            if (newline) return give(line, newline - buffer_, true, whole, at, offset);
            scanned_ = end_;
            if (end_ - begin_ > MAX_LINE) scanned_ = end_ = begin_ + MAX_LINE + 1;  // the rest of it is not kept
            if (fill()) continue;
            if (begin_ < end_) return give(line, end_, false, whole, at, offset);
            close_file();
            ++at_, position_ = line_start_ = 0, begin_ = end_ = scanned_ = 0;
        }
        free(buffer_);
        buffer_ = nullptr;
        return false;
    }

  private:
    bool give(string_view* line, int64_t stop, bool newline, bool* whole, int64_t* at, int64_t* offset) {
        int64_t size = stop - begin_;
        if (size > MAX_LINE) size = MAX_LINE, counts_[CUT]++;
        *line = string_view(buffer_ + begin_, size);
        *whole = newline, *at = segments_[at_].index, *offset = line_start_;
        begin_ = scanned_ = newline ? stop + 1 : stop;
        line_start_ = position_ - (end_ - begin_);
        return true;
    }

    bool fill() {
        strop_log_segment& segment = segments_[at_];
        if (position_ >= segment.size) {
            if (segment.status == 0) segment.status = 1;
            return false;
        }
        if (segment.status > 1 || segment.status < 0) return false;
        make_room();
        if (file_ < 0 && (file_ = open(segment.path, O_RDONLY | O_CLOEXEC)) < 0) return fail(-errno);
        if (!holds_ && free_descriptors > 0) holds_ = true, --free_descriptors;
        int64_t got = pread(file_, buffer_ + end_, std::min(capacity_ - end_, segment.size - position_), position_);
        if (got <= 0) return fail(got < 0 ? -errno : 2);
        if (!holds_) close(file_), file_ = -1;
        position_ += got, end_ += got;
        return true;
    }

    bool fail(int64_t status) {
        segments_[at_].status = status;
        return false;
    }

    void make_room() {
        if (begin_ > 0) {
            memmove(buffer_, buffer_ + begin_, end_ - begin_);
            scanned_ -= begin_, end_ -= begin_, begin_ = 0;
        }
        if (!buffer_ || (end_ == 0 && capacity_ > nominal_)) {
            free(buffer_);
            buffer_ = (char*)malloc(capacity_ = nominal_);
        } else if (end_ == capacity_) {
            buffer_ = (char*)realloc(buffer_, capacity_ *= 2);
        }
        if (!buffer_) abort();
    }

    void close_file() {
        if (file_ >= 0) close(file_), file_ = -1;
        if (holds_) holds_ = false, ++free_descriptors;
    }

    strop_log_segment* segments_;
    int64_t num_, nominal_;
    int64_t* counts_;
    char* buffer_ = nullptr;
    int64_t capacity_ = 0, begin_ = 0, scanned_ = 0, end_ = 0;  // in the buffer
    int64_t at_ = 0, position_ = 0, line_start_ = 0;            // in the segments
    int file_ = -1;
    bool holds_ = false;
};

class Stream {
  public:
    Stream(strop_log_stream* about, const strop_log_options& options, const Hints& hints)
        : about(about), node(about->node), options_(options), hints_(hints), key_(about->floor_us),
          lines_(about->segments, about->num_structured, options.buffer_bytes, about->counts),
          raw_(about->segments + about->num_structured, about->num_raw, options.buffer_bytes, about->counts) {}

    // The next line becomes `line`, its views valid until the next call.
    bool advance() {
        if (!held_) {
            bool whole;
            int64_t at, offset;
            string_view text;
            while (text.empty()) {  // a blank one stands behind a torn one
                if (lines_.next(&text, &whole, &at, &offset)) continue;
                if (!peek_raw()) return false;
                key_ = std::max(key_, about->raw_end_us);
                return take_raw();
            }
            about->counts[READ]++;
            waiting_ = Line();
            if (hints_.in(text)) {
                int64_t size = 0;
                const char* other = options_.redact_line(text.data(), text.size(), &size);
                if (other) own_.assign(other, size), text = own_;
            }
            if (!parse_line(text, &waiting_)) {
                about->counts[FOREIGN]++;
                about->counts[TORN] += !whole;
                untimed();
                return plain(text);
            }
            place();
            held_ = true;
        }
        if (peek_raw() && (raw_at_ < waiting_.mark_segment ||
                           (raw_at_ == waiting_.mark_segment && raw_offset_ < waiting_.mark_offset)))
            return take_raw();
        held_ = false;
        line = waiting_;
        step = line.step;
        if (phase != line.phase) phase = line.phase;
        if (node != line.node) node = line.node;
        return true;
    }

    bool operator>(const Stream& other) const {
        if (line.key != other.line.key) return line.key > other.line.key;
        if (about->rank != other.about->rank) return about->rank > other.about->rank;
        return about->attempt > other.about->attempt;
    }

    strop_log_stream* about;
    Line line;
    string node, phase;  // as the newest structured line has them
    int64_t step = -1;
    bool opened = false;

  private:
    void place() {
        int64_t* counts = about->counts;
        counts[BAD_UTF8] += waiting_.bad_utf8;
        counts[DROPPED] = std::max(counts[DROPPED], waiting_.dropped);  // a running total
        waiting_.time = std::clamp<int64_t>(waiting_.time - about->offset_us, 0, LAST_TIME);
        counts[CLOCK_BACK] += timed_ && waiting_.time < key_ - CLOCK_BACK_US;
        key_ = waiting_.key = std::max(key_, waiting_.time);
        timed_ = true;
    }

    void untimed() {
        if (!timed_) key_ = std::max(key_, about->began_us);
    }

    bool plain(string_view text) {
        line = Line();
        line.plain = true;
        line.key = line.time = key_;
        line.level = "RAW";
        line.step = step, line.phase = phase, line.node = node;
        line.bad_utf8 = !valid_utf8(text);
        about->counts[BAD_UTF8] += line.bad_utf8;
        int64_t size = 0;
        const char* other = options_.redact ? options_.redact(text.data(), text.size(), &size) : nullptr;
        if (other) redacted_.assign(other, size), text = redacted_;
        line.message = text;
        return true;
    }

    // The next raw line that is not blank; of what overwrote itself by \r, the last state.
    bool peek_raw() {
        bool whole;
        while (!has_raw_) {
            if (!raw_.next(&raw_text_, &whole, &raw_at_, &raw_offset_)) return false;
            while (!raw_text_.empty() && raw_text_.back() == '\r') raw_text_.remove_suffix(1);
            size_t last = raw_text_.rfind('\r');
            if (last != string_view::npos) {
                about->counts[OVERWRITTEN] += std::count(raw_text_.begin(), raw_text_.end(), '\r');
                raw_text_.remove_prefix(last + 1);
            }
            has_raw_ = !raw_text_.empty();
        }
        return true;
    }

    bool take_raw() {
        has_raw_ = false;
        about->counts[READ]++;
        about->counts[RAW]++;
        untimed();
        return plain(raw_text_);
    }

    const strop_log_options& options_;
    const Hints& hints_;
    int64_t key_;
    bool timed_ = false, held_ = false, has_raw_ = false;
    Line waiting_;  // a structured line, while raw lines before its mark come first
    string_view raw_text_;
    int64_t raw_at_ = 0, raw_offset_ = 0;
    string redacted_, own_;
    Lines lines_, raw_;
};

}  // namespace

struct strop_log_merge {
    strop_log_merge(strop_log_stream* streams, int64_t num, const strop_log_options& given)
        : options(given), hints(options.hints), printer(options) {
        free_descriptors = options.max_open;
        for (int64_t i = 0; i < num; i++) {
            heap.push_back(std::make_unique<Stream>(&streams[i], options, hints));
            heap.back()->line.key = streams[i].floor_us;
        }
        std::make_heap(heap.begin(), heap.end(), later);
    }

    static bool later(const std::unique_ptr<Stream>& a, const std::unique_ptr<Stream>& b) { return *a > *b; }

    // The top has changed: move it to its place.
    void sink() {
        size_t i = 0, num = heap.size();
        for (size_t child; (child = 2 * i + 1) < num; i = child) {
            if (child + 1 < num && *heap[child] > *heap[child + 1]) ++child;
            if (!(*heap[i] > *heap[child])) return;
            std::swap(heap[i], heap[child]);
        }
    }

    bool pass(const Stream& stream) {
        const Line& line = stream.line;
        if (!line.plain && line.logger == "raw") return false;  // only carries a mark
        if (line.key < options.since_us || level_number(line.level) < options.level) return false;
        if (options.step_low >= 0 && (line.step < options.step_low || line.step > options.step_high)) return false;
        if (options.phase && unescape(line.phase) != options.phase) return false;
        if (options.nodes && string_view(options.nodes).find("\n" + unescape(line.node) + "\n") == string_view::npos)
            return false;
        if (!options.grep) return true;
        string text = line.plain ? string(line.message) : unescape(line.message);
        if (!line.traceback.empty()) text += "\n" + unescape(line.traceback);
        int found = options.grep(text.data(), text.size());
        stopped |= found < 0;
        return found > 0;
    }

    // Fills the printer with the next lines; false once nothing is left.
    bool next() {
        printer.out.clear();
        for (int64_t n = 0; n < LINES_PER_CALL && printer.out.size() < OUT_BYTES && !stopped; n++) {
            if (heap.empty() || heap.front()->line.key > options.until_us) {
                heap.clear();
                printer.flush();
                return false;
            }
            Stream& stream = *heap.front();
            if (stream.opened && pass(stream)) {
                stream.about->counts[SHOWN]++;
                printer.add(stream.line, *stream.about);
            }
            stream.opened = true;
            if (!stream.advance()) {
                std::swap(heap.front(), heap.back());
                heap.pop_back();
            }
            if (!heap.empty()) sink();
        }
        return !stopped;
    }

    strop_log_options options;
    Hints hints;
    Printer printer;
    std::vector<std::unique_ptr<Stream>> heap;
    bool stopped = false;
};

extern "C" {

int strop_log_abi(void) { return STROP_LOG_ABI; }

// `streams` and what it points to must live as long as the merge.
strop_log_merge* strop_log_open(strop_log_stream* streams, int64_t num, const strop_log_options* options) {
    return new strop_log_merge(streams, num, *options);
}

// The next bytes of the output, valid until the next call. Returns 0 with the last ones.
int strop_log_next(strop_log_merge* merge, const char** text, int64_t* size) {
    bool more = merge->next();
    *text = merge->printer.out.data();
    *size = merge->printer.out.size();
    return more;
}

void strop_log_close(strop_log_merge* merge) { delete merge; }

}
