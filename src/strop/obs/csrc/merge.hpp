// The C interface of the log merge, and what its two halves share: merge.cpp (files -> lines in order) and
// log_text.cpp (a line -> text, equal lines collapsed). strop/obs/merge_python.py and log_text.py say the
// same in Python, and a test holds both to the same bytes: change them together.
#pragma once
#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#define STROP_LOG_ABI 2

// What is counted for a stream: all lines, raw ones among them, shown; no JSON, torn, cut at MAX_LINE, not
// UTF-8, clock went back, text overwritten by \r, deleted by the writer.
enum { READ, RAW, SHOWN, FOREIGN, TORN, CUT, BAD_UTF8, CLOCK_BACK, OVERWRITTEN, DROPPED, NUM_COUNTS };

// A segment's status after it was read: 0 not read, 1 whole, 2 shorter than its size, else -errno.
struct strop_log_segment {
    const char* path;
    int64_t size;   // read up to here
    int64_t index;  // by its name
    int64_t status;
};

// One rank of one attempt. Its segments stand in one array: the structured ones, then the raw ones.
struct strop_log_stream {
    int64_t rank, attempt;
    int64_t offset_us;   // its clock less rank 0's
    int64_t floor_us;    // no key is less
    int64_t began_us;    // for lines before the first that has a time
    int64_t raw_end_us;  // for raw lines behind the last mark
    int64_t num_structured, num_raw;
    strop_log_segment* segments;
    const char* node;  // until a line says it
    int64_t counts[NUM_COUNTS];
};

struct strop_log_options {
    int64_t since_us, until_us, step_low, step_high;  // inclusive; step_low < 0: any step or none
    const char* phase;                                // NULL: any
    const char* nodes;                                // each with a newline behind it; NULL: any
    int64_t level, window_us, max_groups, max_open, buffer_bytes;
    int64_t json, collapse, ranges, colour, show_attempt;
    int (*grep)(const char* text, int64_t size);  // 0: no match, 1: match, -1: stop; NULL: no pattern
    // What a plain line is shown as, valid until the next call; NULL: as it is.
    const char* (*redact)(const char* text, int64_t size, int64_t* new_size);
    // The same for a structured line, asked only if it has one of `hints`: each with a newline behind it, lower
    // case; behind a '=' stands one that counts if a = or : follows in the line, behind a blank any other.
    const char* (*redact_line)(const char* text, int64_t size, int64_t* new_size);
    const char* hints;
};

using std::string;
using std::string_view;

struct Line {
    int64_t key = 0, time = 0;  // microseconds: for the order, and as it is shown
    bool plain = false;         // raw, or no JSON: `message` is the text itself
    bool bad_utf8 = false;
    string_view whole, level, logger, message, traceback, phase, node;
    int64_t step = -1, mark_segment = -1, mark_offset = 0, dropped = 0;
};

// What may be the beginning of a secret. A line that has none of these words needs no look by `redact_line`.
class Hints {
  public:
    explicit Hints(const char* lines);
    bool in(string_view text) const;

  private:
    std::vector<uint16_t> groups_;            // by the first two bytes of a word: which of `words_`, or 0
    std::vector<std::vector<string>> words_;  // of one group each
};

int level_number(string_view level);
bool parse_line(string_view text, Line* line);
bool valid_utf8(string_view text);
string unescape(string_view text);
void append_printable(string* out, string_view json);
void append_json(string* out, string_view text);
void append_time(string* out, int64_t time_us, bool iso);
void append_valid(string* out, string_view text, const char* backslash);

struct Number {
    double low, high;
    string low_text, high_text;
};

// Lines that are one in the output; it stands at its first one.
struct Group {
    int64_t key_us, time, attempt, step;
    string key, level, phase, logger, message, traceback;
    std::vector<int64_t> ranks;
    std::vector<uint64_t> seen;
    std::vector<string> text;  // --ranges: what stands around the numbers
    std::vector<Number> numbers;
};

class Printer {
  public:
    explicit Printer(const strop_log_options& options) : options_(options) {}
    void add(const Line& line, const strop_log_stream& stream);
    void expire(int64_t key_us);
    void flush();
    string out;

  private:
    void one(const Line& line, const strop_log_stream& stream);
    void json(const Line& line, const strop_log_stream& stream);
    void collapse(const Line& line, const strop_log_stream& stream);
    void start(const Line& line, const strop_log_stream& stream, string_view text);
    void split(const string& message);
    void widen(Group* group);
    void pop();
    void print(const Group& group);
    const strop_log_options& options_;
    std::deque<Group> groups_;
    std::unordered_map<string_view, Group*> open_;
    string key_;
    std::vector<string> text_;  // of the newest line, by `split`
    std::vector<Number> numbers_;
};
