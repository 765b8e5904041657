// Handles, params, Jacobi infos and workspaces.
#include "cusolver.h"

#include <cstring>
#include <map>

namespace mock::cusolver {
namespace {

std::map<std::string, Query> queries;

template <typename Object>
cusolverStatus_t create(const char* routine, const char* kind, Object** object) {
  if (const auto status = enter(routine)) return status;
  *object = new Object();
  ++state().live[kind];
  ++state().created[kind];
  return kSuccess;
}

template <typename Object>
cusolverStatus_t destroy(const char* routine, const char* kind, Object* object) {
  if (!expect(object, routine, "null")) return kInvalid;
  delete object;
  --state().live[kind];
  return enter(routine);
}

}  // namespace

bool is_ready(const std::string& routine, cusolverDnHandle_t handle) {
  return expect(handle, routine, "no handle") && expect(handle->has_stream, routine, "no stream was set") &&
         expect(handle->thread == std::this_thread::get_id(), routine, "handle of another thread");
}

bool check_info(const std::string& routine, const int* info, std::int64_t batch) {
  return expect(on_device(info, sizeof(int) * static_cast<std::size_t>(batch)), routine, "info is out of bounds");
}

Query& last_query(const std::string& routine) { return queries[routine]; }

Query answer(const std::string& routine, const std::string& arguments, std::size_t device, std::size_t host) {
  Query& query = queries[routine];
  query = {arguments, device, host};
  Query told = query;
  if (state().short_workspace == routine) told.device /= 2;
  return told;
}

cusolverStatus_t use_workspace(const std::string& routine, const std::string& arguments, void* device,
                               std::size_t device_bytes, void* host, std::size_t host_bytes) {
  const Query& query = queries[routine];
  if (!expect(query.arguments == arguments, routine,
              "asked for workspace with (" + query.arguments + "), runs with (" + arguments + ")")) {
    return kInvalid;
  }
  if (device_bytes < query.device || host_bytes < query.host) return CUSOLVER_STATUS_INVALID_WORKSPACE;
  if (!expect(on_device(device, device_bytes), routine, "workspace is not device memory") ||
      !expect(host || host_bytes == 0, routine, "no host workspace")) {
    return kInvalid;
  }
  std::memset(device, 0xa5, device_bytes);
  if (host_bytes) std::memset(host, 0xa5, host_bytes);
  return kSuccess;
}

}  // namespace mock::cusolver

using namespace mock::cusolver;

extern "C" {

cusolverStatus_t CUSOLVERAPI cusolverDnCreate(cusolverDnHandle_t* handle) {
  return create("cusolverDnCreate", "handle", handle);
}

cusolverStatus_t CUSOLVERAPI cusolverDnDestroy(cusolverDnHandle_t handle) {
  if (!expect(handle && handle->device == state().device, "cusolverDnDestroy", "on another device")) return kInvalid;
  return destroy("cusolverDnDestroy", "handle", handle);
}

cusolverStatus_t CUSOLVERAPI cusolverDnSetStream(cusolverDnHandle_t handle, cudaStream_t) {
  if (const auto status = enter("cusolverDnSetStream")) return status;
  if (!expect(handle, "cusolverDnSetStream", "no handle")) return CUSOLVER_STATUS_NOT_INITIALIZED;
  handle->has_stream = true;
  return kSuccess;
}

cusolverStatus_t CUSOLVERAPI cusolverDnCreateParams(cusolverDnParams_t* params) {
  return create("cusolverDnCreateParams", "params", params);
}

cusolverStatus_t CUSOLVERAPI cusolverDnDestroyParams(cusolverDnParams_t params) {
  return destroy("cusolverDnDestroyParams", "params", params);
}

cusolverStatus_t CUSOLVERAPI cusolverDnCreateGesvdjInfo(gesvdjInfo_t* info) {
  return create("cusolverDnCreateGesvdjInfo", "jacobi info", info);
}

cusolverStatus_t CUSOLVERAPI cusolverDnDestroyGesvdjInfo(gesvdjInfo_t info) {
  return destroy("cusolverDnDestroyGesvdjInfo", "jacobi info", info);
}

}  // extern "C"
