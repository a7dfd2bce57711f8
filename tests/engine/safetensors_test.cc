#include "engine/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/shared_data.h"
#include "tests/support/temp_folder.h"

namespace spillway {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string LengthBytes(std::uint64_t length) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<char>(length >> (8 * i)));
  return bytes;
}

std::string FileOf(const std::string& header, std::size_t data_bytes) {
  return LengthBytes(header.size()) + header + std::string(data_bytes, '\1');
}

absl::Status OpenBytes(const std::string& bytes) {
  const TempFolder folder;
  folder.Write("model.safetensors", bytes);
  return Checkpoint::Open(folder.path()).status();
}

std::vector<NamedTensor> ThreeTensors() {
  return {{"a", DType::kF32, {2, 3}, {0, 1, 2, 3, 4, 5}},
          {"b", DType::kBF16, {3}, {1, -2, 0.5}},
          {"c", DType::kF16, {1, 2}, {3, -0.25}}};
}

float At(const TensorView& view, std::size_t index) {
  if (view.dtype == DType::kF32) {
    float value;
    std::memcpy(&value, view.data + 4 * index, 4);
    return value;
  }
  std::uint16_t half;
  std::memcpy(&half, view.data + 2 * index, 2);
  return view.dtype == DType::kBF16 ? FloatFromBF16(half) : FloatFromF16(half);
}

void ExpectThreeTensors(const Checkpoint& checkpoint) {
  EXPECT_THAT(checkpoint.Names(), ElementsAre("a", "b", "c"));
  EXPECT_EQ(checkpoint.total_bytes(), 24U + 6U + 4U);
  for (const NamedTensor& wanted : ThreeTensors()) {
    const auto view = checkpoint.Find(wanted.name);
    ASSERT_TRUE(view.ok()) << view.status();
    EXPECT_EQ(view->dtype, wanted.dtype);
    EXPECT_EQ(view->shape, wanted.shape);
    ASSERT_EQ(view->size_bytes, wanted.values.size() * SizeOf(wanted.dtype));
    for (std::size_t i = 0; i < wanted.values.size(); ++i) EXPECT_EQ(At(*view, i), wanted.values[i]);
    checkpoint.Release(*view);
    for (std::size_t i = 0; i < wanted.values.size(); ++i) EXPECT_EQ(At(*view, i), wanted.values[i]);
  }
  EXPECT_EQ(checkpoint.Find("d").status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(checkpoint.Find("d").status().message()), HasSubstr("'d'"));
}

TEST(Safetensors, ReadsOneFile) {
  const TempFolder folder;
  ASSERT_TRUE(WriteCheckpoint(folder.path(), "{}", ThreeTensors()).ok());
  const auto checkpoint = Checkpoint::Open(folder.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  ExpectThreeTensors(**checkpoint);
}

TEST(Safetensors, ReadsShards) {
  for (const int shards : {2, 3}) {
    const TempFolder folder;
    ASSERT_TRUE(WriteCheckpoint(folder.path(), "{}", ThreeTensors(), shards).ok());
    const auto checkpoint = Checkpoint::Open(folder.path());
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    ExpectThreeTensors(**checkpoint);
  }
}

TEST(Safetensors, ReleaseKeepsTheNeighboursPages) {
  const TempFolder folder;
  std::vector<NamedTensor> tensors;
  for (const char* name : {"x", "y", "z"}) {
    tensors.push_back({name, DType::kF32, {5000}, std::vector<float>(5000, static_cast<float>(name[0]))});
  }
  ASSERT_TRUE(WriteCheckpoint(folder.path(), "{}", tensors).ok());
  const auto checkpoint = Checkpoint::Open(folder.path());
  ASSERT_TRUE(checkpoint.ok());
  (*checkpoint)->Release(*(*checkpoint)->Find("y"));
  for (const char* name : {"x", "y", "z"}) {
    const TensorView view = *(*checkpoint)->Find(name);
    for (std::size_t i = 0; i < 5000; ++i) ASSERT_EQ(At(view, i), static_cast<float>(name[0]));
  }
}

TEST(Safetensors, NamesWhatItLookedFor) {
  const TempFolder folder;
  const absl::Status status = Checkpoint::Open(folder.path()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("model.safetensors.index.json"));
}

TEST(Safetensors, OtherTypesAreFineUntilAskedFor) {
  const TempFolder folder;
  folder.Write("model.safetensors",
               FileOf(R"({"i":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
                      R"("new":{"dtype":"F4","shape":[4],"data_offsets":[8,10]},)"
                      R"("f":{"dtype":"F32","shape":[],"data_offsets":[10,14]},"__metadata__":{"a":"b"}})",
                      14));
  const auto checkpoint = Checkpoint::Open(folder.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_TRUE((*checkpoint)->Find("f").ok());
  for (const char* name : {"i", "new"}) {
    EXPECT_EQ((*checkpoint)->Find(name).status().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_EQ((*checkpoint)->Find("__metadata__").status().code(), absl::StatusCode::kNotFound);
}

TEST(Safetensors, EmptyTensorsAndFilesAreFine) {
  EXPECT_TRUE(OpenBytes(FileOf("{}", 0)).ok());
  EXPECT_TRUE(OpenBytes(FileOf(R"({"e":{"dtype":"F32","shape":[0,5],"data_offsets":[0,0]}})", 0)).ok());
}

TEST(Safetensors, RefusesEveryTruncation) {
  const std::string whole = SafetensorsBytes(ThreeTensors());
  ASSERT_TRUE(OpenBytes(whole).ok());
  for (std::size_t size = 0; size < whole.size(); ++size) {
    ASSERT_EQ(OpenBytes(whole.substr(0, size)).code(), absl::StatusCode::kInvalidArgument) << size;
  }
  EXPECT_EQ(OpenBytes(whole + "x").code(), absl::StatusCode::kInvalidArgument);
}

struct BadHeader {
  const char* name;
  std::string header;
  const char* message;
};

TEST(Safetensors, RefusesBadHeaders) {
  const auto tensor = [](const std::string& shape, const std::string& offsets, const std::string& dtype = "\"F32\"") {
    return absl::StrCat(R"({"t":{"dtype":)", dtype, R"(,"shape":)", shape, R"(,"data_offsets":)", offsets, "}}");
  };
  const std::string good = R"("t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
  const BadHeader cases[] = {
      {"not JSON", "{\"t\":", "not valid JSON"},
      {"not an object", "[1]", "does not begin with '{'"},
      {"leading space", " {}", "does not begin with '{'"},
      {"invalid UTF-8", "{\"\xff\":1}", "not valid JSON"},
      {"nested", absl::StrCat("{\"t\":", std::string(100000, '['), std::string(100000, ']'), "}"), "nested"},
      {"tensor is a number", R"({"t":1})", "dtype is missing"},
      {"no dtype", R"({"t":{"shape":[2],"data_offsets":[0,8]}})", "dtype is missing"},
      {"dtype is a number", tensor("[2]", "[0,8]", "7"), "wanted a string"},
      {"no shape", R"({"t":{"dtype":"F32","data_offsets":[0,8]}})", "shape is missing"},
      {"negative dimension", tensor("[-2]", "[0,8]"), "dimension -2"},
      {"fraction", tensor("[2.0]", "[0,8]"), "dimension 2.0"},
      {"over int64", tensor("[9223372036854775808]", "[0,8]"), "dimension 9223372036854775808"},
      {"over uint64", tensor("[18446744073709551616]", "[0,8]"), "dimension"},
      {"product overflows", tensor("[4294967296,4294967296]", "[0,8]"), "64 bits"},
      {"bytes overflow", tensor("[4611686018427387906]", "[0,8]"), "64 bits"},
      {"rank", tensor("[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,2]", "[0,8]"), "33 dimensions"},
      {"no offsets", R"({"t":{"dtype":"F32","shape":[2]}})", "data_offsets"},
      {"one offset", tensor("[2]", "[8]"), "data_offsets"},
      {"negative offset", tensor("[2]", "[-8,0]"), "data_offsets"},
      {"fraction offset", tensor("[2]", "[0,8.0]"), "data_offsets"},
      {"backwards", tensor("[2]", "[8,0]"), "leave the data section"},
      {"past the end", tensor("[4]", "[0,16]"), "leave the data section"},
      {"huge end", tensor("[2]", "[18446744073709551608,18446744073709551615]"), "leave the data section"},
      {"shape too small", tensor("[1]", "[0,8]"), "need 4"},
      {"dtype too small", tensor("[2]", "[0,8]", "\"F16\""), "need 4"},
      {"hole at begin", tensor("[1]", "[4,8]"), "hole"},
      {"hole at end", tensor("[1]", "[0,4]"), "end at byte 4"},
      {"overlap", absl::StrCat("{", good, R"(,"u":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})"), "overlapping"},
      {"same range", absl::StrCat("{", good, R"(,"u":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})"),
       "overlapping"},
      {"duplicate name", absl::StrCat("{", good, ",", good, "}"), "occurs twice"},
      {"duplicate member", R"({"t":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}})", "occurs twice"},
  };
  ASSERT_TRUE(OpenBytes(FileOf(absl::StrCat("{", good, "}"), 8)).ok());
  for (const BadHeader& bad : cases) {
    const absl::Status status = OpenBytes(FileOf(bad.header, 8));
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bad.name;
    EXPECT_THAT(std::string(status.message()), HasSubstr(bad.message)) << bad.name;
  }
}

TEST(Safetensors, RefusesHeaderLengthsBeyondFileOrLimit) {
  EXPECT_THAT(std::string(OpenBytes(LengthBytes(100) + "{}").message()), HasSubstr("truncated"));
  EXPECT_THAT(std::string(OpenBytes(LengthBytes(100'000'001) + "{}").message()), HasSubstr("limit"));
  EXPECT_THAT(std::string(OpenBytes(LengthBytes(UINT64_MAX) + "{}").message()), HasSubstr("limit"));
}

TEST(Safetensors, RefusesWhatIsNoFile) {
  const TempFolder folder;
  ASSERT_EQ(::mkdir(folder.File("model.safetensors").c_str(), 0755), 0);
  EXPECT_EQ(Checkpoint::Open(folder.path()).status().code(), absl::StatusCode::kInvalidArgument);
  const TempFolder other;
  ASSERT_EQ(::mkfifo(other.File("model.safetensors").c_str(), 0644), 0);
  EXPECT_EQ(Checkpoint::Open(other.path()).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(Safetensors, RefusesBadIndexes) {
  const std::pair<const char*, const char*> cases[] = {
      {"[]", "not a JSON object"},
      {"{}", "weight_map"},
      {R"({"weight_map":[]})", "weight_map"},
      {R"({"weight_map":{"t":1}})", "not a string"},
      {R"({"weight_map":{"t":"missing.safetensors"}})", "missing"},
      {R"({"weight_map":{"other":"part.safetensors"}})", "does not have it"},
      {R"({"weight_map":{"t":"../part.safetensors"}})", "not the name of a file of this folder"},
      {R"({"weight_map":{"t":"/etc/passwd"}})", "not the name of a file of this folder"},
      {R"({"weight_map":{"t":".."}})", "not the name of a file of this folder"},
      {R"({"weight_map":{"t":""}})", "not the name of a file of this folder"},
      {R"({"weight_map":{"t":"part.safetensors\u0000x"}})", "not the name of a file of this folder"},
      {R"({"weight_map":{"t":"part.safetensors","t":"part.safetensors"}})", "occurs twice"},
  };
  const TempFolder folder;
  folder.Write("part.safetensors", SafetensorsBytes({{"t", DType::kF32, {1}, {1}}}));
  folder.Write("model.safetensors.index.json", R"({"weight_map":{"t":"part.safetensors"}})");
  ASSERT_TRUE(Checkpoint::Open(folder.path()).ok());
  for (const auto& [index, message] : cases) {
    folder.Write("model.safetensors.index.json", index);
    const absl::Status status = Checkpoint::Open(folder.path()).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << index;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message)) << index;
  }
}

TEST(Safetensors, ReadsTheTrainedModel) {
  SPILLWAY_SHARED_OR_SKIP(folder, "models/stories260K/hf");
  const auto checkpoint = Checkpoint::Open(folder);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto embedding = (*checkpoint)->Find("model.embed_tokens.weight");
  ASSERT_TRUE(embedding.ok()) << embedding.status();
  EXPECT_THAT(embedding->shape, ElementsAre(512, 64));
  EXPECT_EQ((*checkpoint)->total_bytes(), 260032U * 4);
}

}  // namespace
}  // namespace spillway
