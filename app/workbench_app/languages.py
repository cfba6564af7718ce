from workbench_app import view

view.need_trace()
