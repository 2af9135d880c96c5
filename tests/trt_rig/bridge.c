/* The functions that NVIDIA's `tensorrt` bindings import from libnvinfer, libnvinfer_plugin and libnvonnxparser,
 * passed on to TensorRT-RTX. Each factory takes the version that its caller was compiled for and refuses another; the
 * bridge puts RTX's own version there. RTX must be loaded before (tensorrt_libs/__init__.py does it): dlopen then only
 * finds it by its soname. */
#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum library { RTX, PARSER };

static void *find(enum library library, const char *function) {
    static const char *const sonames[] = {"libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"};
    void *handle = dlopen(sonames[library], RTLD_NOW | RTLD_GLOBAL);
    return handle == NULL ? NULL : dlsym(handle, function);
}

static int32_t rtx_version(void) {
    int32_t (*version)(void) = (int32_t (*)(void))find(RTX, "getInferLibVersion");
    return version();
}

int getNvOnnxParserVersion(void) {
    int (*version)(void) = (int (*)(void))find(PARSER, "getNvOnnxParserVersion");
    return version();
}

/* factories of one object: (logger, version) */
#define FACTORY(name)                                                                     \
    void *name(void *logger, int32_t version) {                                           \
        void *(*create)(void *, int32_t) = (void *(*)(void *, int32_t))find(RTX, #name);  \
        (void)version;                                                                    \
        return create(logger, rtx_version());                                             \
    }

/* factories of an object on top of another: (object, logger, version) */
#define FACTORY_ON(library, name, right_version)                                                      \
    void *name(void *object, void *logger, int32_t version) {                                         \
        void *(*create)(void *, void *, int32_t) =                                                    \
            (void *(*)(void *, void *, int32_t))find(library, #name);                                 \
        (void)version;                                                                                \
        return create(object, logger, right_version());                                               \
    }

FACTORY(createInferBuilder_INTERNAL)
FACTORY(createInferRuntime_INTERNAL)
FACTORY_ON(RTX, createInferRefitter_INTERNAL, rtx_version)
FACTORY_ON(PARSER, createNvOnnxParser_INTERNAL, getNvOnnxParserVersion)
FACTORY_ON(PARSER, createNvOnnxParserRefitter_INTERNAL, getNvOnnxParserVersion)

void *getPluginRegistry(void) {
    void *(*registry)(void) = (void *(*)(void))find(RTX, "getPluginRegistry");
    return registry();
}

void *getBuilderPluginRegistry(int capability) {
    void *(*registry)(int) = (void *(*)(int))find(RTX, "getBuilderPluginRegistry");
    return registry(capability);
}

/* RTX has no plugin library; there is nothing to register, which is a success */
bool initLibNvInferPlugins(void *logger, const char *name_space) {
    (void)logger;
    (void)name_space;
    return true;
}
